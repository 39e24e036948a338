"""Cheaper starts of the processes of tests; Python runs this first.

Garbage is collected less often. While TensorFlow is imported and functions are traced, objects
are made by the hundred thousand and few of them are garbage: looking through them took a fifth
of a process's start.

Keras is as it is without scikit-learn, pandas and matplotlib.

Keras imports them where it finds them, though few programs need that. It
takes a third of a process's start, and these tests start hundreds. Only Keras misses them, and
only while it is imported itself.
"""

from __future__ import annotations

import gc
import sys

gc.set_threshold(50_000)


class Hidden:
    """A finder that finds nothing, and of some packages says that there are none."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        keras = getattr(sys.modules.get("keras"), "__spec__", None)
        beginning = getattr(keras, "_initializing", False)
        if beginning and name.partition(".")[0] in ("sklearn", "matplotlib", "pandas"):
            raise ModuleNotFoundError(f"hidden from Keras: {name}", name=name)


sys.meta_path.insert(0, Hidden())  # type: ignore[arg-type]
