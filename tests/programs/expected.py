"""What is expected of each program on each place."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

ONE = "single-1"
SEVERAL = ("mirrored-2", "multi_worker-2", "horovod-2", "parameter_server-2")
EVERYWHERE = (ONE, *SEVERAL)


class Ends(Enum):
    """How a program ends; the value is what the documentation says in a cell."""

    EQUAL = "equal"
    AS_ONE = "as one"
    ALIKE = "alike"
    REFUSED = "refused"
    FAILS = "fails"


@dataclass(frozen=True)
class Expected:
    """What holds for a program on some places.

    Attributes:
        ends: How it ends there.
        why: One line for the documentation; for `REFUSED` the message has it in it.
    """

    ends: Ends = Ends.EQUAL
    why: str = ""


@dataclass(frozen=True)
class Program:
    """A script, and what holds where.

    Attributes:
        elsewhere: What is expected where it is not `EQUAL`, by place.
        tolerance: Of the distance of a variable from plain Keras, relative to its norm.
    """

    elsewhere: dict[str, Expected] = field(default_factory=dict)
    tolerance: float = 1e-4

    def on(self, place: str) -> Expected:
        """Gives what is expected on a place."""
        return self.elsewhere.get(place, Expected())


def unless(ends: Ends, why: str, *places: str) -> Program:
    """Makes a program that ends as plain Keras does except on some places."""
    return Program(dict.fromkeys(places, Expected(ends, why)))


ORDER = "Keras shuffles in another order"
NOISE = "`tf.random` in a step draws other numbers in each replica"

# By what they have in common: the programs of each row take turns on the strategies.
FAMILIES: dict[str, dict[str, Program]] = {
    "own steps": {
        "own_train_step": Program(),
        "vae": Program(),
        "distillation": Program(),
        "accumulated_by_hand": Program(),
        "diffusion": Program(),
        "gan": unless(Ends.ALIKE, NOISE, *EVERYWHERE),
        "wgan_gp": unless(Ends.ALIKE, NOISE, *EVERYWHERE),
    },
    "losses": {
        "siamese": Program(),
        "endpoint_layer": Program(),
        "pairs_in_batch": Program(),
        "several_outputs": Program(),
        "metric_learning": Program(),
    },
    "models": {
        "digits_convnet": unless(Ends.AS_ONE, ORDER, *EVERYWHERE),
        "lora": Program(),
        "transfer": Program(),
        "stateful_rnn": Program(),
        "mixed_precision": Program(tolerance=1e-3),
        "subclassed": unless(
            Ends.ALIKE,
            "BatchNormalization without `synchronized=True` has moments of a share",
            *SEVERAL,
        ),
        "transformer": Program(),
    },
    "data": {
        "text": Program(),
        "ragged_text": Program(),
        "feature_space": Program(),
        "timeseries": Program(),
        "pydataset": Program(),
        "generator": Program(),
        "ragged_tensors": Program(),
        "sparse_features": Program(),
        "scipy_matrix": Program(),
    },
    "callbacks": {
        "schedules": Program(),
        "own_callbacks": Program(),
        "checkpoints": Program(),
    },
    "scripts": {
        "tuner": Program(),
        "saving": Program(),
        "custom_loop": Program(),
        "train_on_batch": Program(),
        "mirrored_scope": Program(),
        "multi_worker_scope": Program(),
        "distributed_loop": unless(
            Ends.REFUSED,
            "A training loop of your own must run on a tf.distribute.Strategy.",
            "parameter_server-2",
        ),
    },
}
PROGRAMS = {name: program for family in FAMILIES.values() for name, program in family.items()}


def always() -> dict[str, str]:
    """Gives where `make test` runs each program: those of a family take turns."""
    chosen = {}
    for first, family in enumerate(FAMILIES.values()):
        for turn, name in enumerate(family, start=first):
            chosen[name] = SEVERAL[turn % len(SEVERAL)]
    return chosen
