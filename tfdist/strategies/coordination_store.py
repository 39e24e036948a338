"""The key-value store of TensorFlow's coordination service, for workers that it connects."""

from __future__ import annotations

import tensorflow as tf

from tfdist import _keras
from tfdist.cluster.key_value_store import KeyValueStore, Limited

# A value is absent for a moment while it is replaced. A read waits this long for it.
_REPLACE_MS = 50
_MAX_TRIES = 20


class CoordinationStore(KeyValueStore):
    """Values in TensorFlow's coordination service, which runs in the chief's process.

    The service runs in threads of its own. It answers while the chief's Python code is busy
    or waits. It does not answer if the chief's process is stopped.

    Args:
        num_workers: Number of workers.
    """

    keeper = 0

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self._limited = Limited()

    @classmethod
    def of_this_process(cls, num_workers: int) -> CoordinationStore | None:
        """Returns the store, or None if the coordination service connects no workers.

        Args:
            num_workers: Number of workers.
        """
        store = _keras.key_value_store()
        return None if store is None or num_workers == 1 else cls(num_workers)

    def post(self, name: str, text: str) -> bool:
        """Sets the value of a key, in place of an earlier value."""

        def put() -> bool:
            store = _keras.key_value_store()
            for _ in range(_MAX_TRIES):
                try:
                    # The service refuses to change a value, so delete it first.
                    store.delete_config_key_value(_key(name))
                    store.set_config_key_value(_key(name), text)
                except tf.errors.AlreadyExistsError:
                    continue  # another worker posted under this name between the two
                except (tf.errors.OpError, RuntimeError):
                    return False
                return True
            return False

        return bool(self._limited.call(put))

    def read(self, name: str) -> str | None:
        """Returns the value of a key, or None."""

        def get() -> str | None:
            try:
                value = _keras.key_value_store().get_config_key_value(_key(name), _REPLACE_MS)
            except (tf.errors.OpError, RuntimeError):
                return None
            return str(value)

        value: str | None = self._limited.call(get)
        return value


def _key(name: str) -> str:
    # A slash would make a folder: deleting its name would delete the keys below it too.
    return f"tfdist/{name.replace('/', ':')}"
