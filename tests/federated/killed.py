"""A training with secure sums on three workers, of which one is killed within a round.

tfdist run -n 3 --max-restarts 2 tests/federated/killed.py FOLDER

FOLDER gets the checkpoints, the first message of each worker in each round (`sent-*`), and at
last the weights of each worker (`final-*`).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import keras

import tfdist
from tests.federated.reference import model_of, rows_of
from tests.jobs import write
from tfdist.federated.masks import PairwiseMasks

ROUNDS, STRUCK = 5, 3
PARTS = rows_of(40, 33, 50)


def main(folder: Path) -> None:
    worker = tfdist.init(seed=5).strategy.place.worker_index
    add_masks = PairwiseMasks.add_to

    def recorded(self: Any, number: int, lane: int, vectors: Any) -> Any:
        masked = add_masks(self, number, lane, vectors)
        write(masked[0].tobytes(), folder / f"sent-{worker}-{number}-{os.getpid()}")
        if number == STRUCK and worker == 1 and not (folder / "struck").exists():
            (folder / "struck").touch()
            os.kill(os.getpid(), signal.SIGKILL)  # the others have sent, or will
        return masked

    PairwiseMasks.add_to = recorded  # type: ignore[method-assign]
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    model = model_of(keras.optimizers.SGD(0.1, momentum=0.9))
    x, y = PARTS[worker]
    tfdist.fit(
        model,
        x,
        y,
        batch_size=16,
        shuffle=False,
        epochs=ROUNDS,
        shard="local",
        verbose=2,
        checkpoint=tfdist.Checkpoint(folder / "checkpoints", every="epoch"),
        federated=tfdist.FedAvg(local_epochs=1, secure=tfdist.SecureSum()),
    )
    write(model.get_weights(), folder / f"final-{worker}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
