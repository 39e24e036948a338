"""The key-value store of workers that TensorFlow connects: its coordination service's."""

from __future__ import annotations

import tensorflow as tf

from tfdist import _keras
from tfdist.cluster.key_value_store import KeyValueStore, Limited

# A note that is replaced is gone for a moment; the store can be asked to wait so long.
_REPLACED_MS = 50
_TRIES = 20


class CoordinationStore(KeyValueStore):
    """Notes in TensorFlow's coordination service, which the chief's process keeps.

    The service runs beside Python, so a chief that is busy or waits answers all the same;
    one that is stopped does not.

    Args:
        num_workers: How many workers there are.
    """

    keeper = 0

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self._limited = Limited()

    @classmethod
    def of_this_process(cls, num_workers: int) -> CoordinationStore | None:
        """Gives the key-value store, if TensorFlow's coordination service connects the workers.

        Args:
            num_workers: How many workers there are.
        """
        store = _keras.key_value_store()
        return None if store is None or num_workers == 1 else cls(num_workers)

    def post(self, name: str, text: str) -> bool:
        """Puts a note in the place of what was there."""

        def put() -> bool:
            store = _keras.key_value_store()
            for _ in range(_TRIES):
                try:
                    # The service refuses to change a value.
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
        """Gives a note."""

        def get() -> str | None:
            try:
                value = _keras.key_value_store().get_config_key_value(_key(name), _REPLACED_MS)
            except (tf.errors.OpError, RuntimeError):
                return None
            return str(value)

        note: str | None = self._limited.call(get)
        return note


def _key(name: str) -> str:
    # With slashes a name would be a folder of others, which goes with all that is in it.
    return f"tfdist/{name.replace('/', ':')}"
