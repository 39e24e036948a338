"""What the workers of `tfdist test` have found; the chief writes it to a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ALL_REDUCE, ALL_GATHER, SERVER = "all-reduce", "all-gather", "read and add"


@dataclass(frozen=True)
class Compared:
    """A small training, compared with one process.

    Attributes:
        training: The name of the training.
        distance: The largest distance of a variable from that of one process, relative to its
            largest element.
        tolerance: The largest distance that is the order of float additions.
        differs: The workers whose weights are not bit for bit those of the chief.
    """

    training: str
    distance: float
    tolerance: float
    differs: tuple[int, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether the training is the same as in one process."""
        return self.distance <= self.tolerance and not self.differs


@dataclass(frozen=True)
class Timing:
    """The time of a collective.

    Attributes:
        operation: Which one.
        size: Bytes of each replica's tensor.
        seconds: The median of its times on the chief.
        repetitions: How often it was timed.
    """

    operation: str
    size: int
    seconds: float
    repetitions: int


@dataclass(frozen=True)
class Speed:
    """How fast a worker computes while all others compute too.

    Attributes:
        worker: The worker.
        host: The name that its machine has for itself.
        device: The kind of its devices.
        flops: Floating-point operations a second, of products of matrices.
        threads: The threads of an operation on its processor.
    """

    worker: int
    host: str
    device: str
    flops: float
    threads: int


@dataclass(frozen=True)
class Result:
    """The findings of the workers.

    Attributes:
        strategy: The name of the strategy.
        description: How it divides a batch.
        workers: Number of workers.
        replicas: Number of replicas.
        sums_are_exact: Whether sums of integers were exact on every replica.
        trainings: The trainings.
        timings: The times of collectives.
        speeds: The speed of each worker.
    """

    strategy: str
    description: str
    workers: int
    replicas: int
    sums_are_exact: bool
    trainings: tuple[Compared, ...]
    timings: tuple[Timing, ...]
    speeds: tuple[Speed, ...]

    def write(self, file: Path) -> None:
        """Writes the result.

        Args:
            file: The file.
        """
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Result:
        """Reads a result.

        Args:
            file: The file that `write` has written.
        """
        fields = json.loads(file.read_text())
        kinds = (("trainings", Compared), ("timings", Timing), ("speeds", Speed))
        for name, kind in kinds:
            fields[name] = tuple(kind(**entry) for entry in fields[name])
        return cls(**fields)
