"""The same trainings in one process with plain Keras: `tfdist test` compares with these.

`python -m tfdist.scripts.self_test.one_process FILE` writes all weights to a file.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from tfdist.scripts.self_test.trainings import TRAININGS, train


def _plain(model: Any, x: Any, y: Any, **options: Any) -> Any:
    return model.fit(x, y, **options)


def main() -> None:
    """Trains, and writes the weights so that a reader sees all of them or no file."""
    target = Path(sys.argv[1])
    try:
        weights = {training.name: train(training, _plain) for training in TRAININGS}
    except Exception as error:
        target.with_name(f"{target.name}.failed").write_text(f"{type(error).__name__}: {error}")
        raise
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(pickle.dumps(weights))
    os.replace(part, target)


if __name__ == "__main__":
    main()
