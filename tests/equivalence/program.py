"""Trains all cases on one strategy and writes what must be equal, a file a case.

python -m tests.equivalence.program STRATEGY REPLICAS FOLDER [CASE ...]
"""

from __future__ import annotations

import functools
import sys
import traceback
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfdist
from tests.equivalence.cases import CASES
from tests.jobs import begin, write

SEED = 7


def run(name: str, target: Path) -> None:
    keras.utils.set_random_seed(SEED)
    keras.backend.clear_session()
    train = functools.partial(tfdist.fit, seed=SEED, verbose=0)
    try:
        models, history = CASES[name](train)
        models = models if isinstance(models, list) else [models]
        result: Any = {
            "weights": [[np.asarray(v) for v in m.variables] for m in models],
            "optimizer": [[np.asarray(v) for v in m.optimizer.variables] for m in models],
            "plain": all(
                type(v._value).__name__ == "ResourceVariable"
                for m in models
                for v in m.variables
            ),
            "history": history.history,
        }
    except Exception:
        result = {"error": traceback.format_exc()}
    write(result, target)


def main(strategy: str, replicas: str, folder: Path, *names: str) -> None:
    session = begin(strategy, replicas, SEED)
    worker = "" if session.is_chief else ".other"
    for name in names or CASES:
        run(name, folder / f"{name}.{strategy}-{replicas}{worker}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
