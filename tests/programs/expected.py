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
        each_time: Whether it ends so each time; a race does not.
    """

    ends: Ends = Ends.EQUAL
    why: str = ""
    each_time: bool = True


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


WORKERS = ("multi_worker-2", "horovod-2")
SERVERS = "parameter_server-2"
ORDER = "Keras shuffles arrays in another order"
NOISE = "`tf.random` draws other numbers than in plain Keras; `keras.random` draws the same"
MOMENTS = (
    "BatchNormalization without `synchronized=True` uses the moments of a per-replica batch"
)
FOR_ITSELF = "every worker computes everything: no faster"
WHOLE = "every replica computes the whole batch: no faster"
CHECKPOINT = "A tf.train.Checkpoint must be saved after training"
LOOP = "A training loop of your own must run on a tf.distribute.Strategy."

# By what they have in common: the programs of each family take turns on the strategies.
FAMILIES: dict[str, dict[str, Program]] = {
    "custom steps": {
        "own_train_step": Program(),
        "vae": Program(),
        "distillation": Program(),
        "accumulated_by_hand": unless(Ends.EQUAL, WHOLE, *SEVERAL),
        "diffusion": Program(),
        "gan": unless(Ends.ALIKE, NOISE, *EVERYWHERE),
        "wgan_gp": unless(Ends.ALIKE, NOISE, *EVERYWHERE),
    },
    "losses": {
        "siamese": Program(),
        "endpoint_layer": Program(),
        "pairs_in_batch": unless(Ends.EQUAL, WHOLE, *SEVERAL),
        "several_outputs": Program(),
        "metric_learning": unless(Ends.EQUAL, WHOLE, *SEVERAL),
    },
    "models": {
        "digits_convnet": unless(Ends.AS_ONE, ORDER, *EVERYWHERE),
        "lora": Program(),
        "transfer": Program(),
        "stateful_rnn": unless(Ends.EQUAL, WHOLE, *SEVERAL),
        "mixed_precision": Program(tolerance=1e-3),
        "subclassed": unless(Ends.ALIKE, MOMENTS, *SEVERAL),
        "transformer": Program(),
    },
    "data": {
        "text": Program(),
        "ragged_text": Program(),
        "ragged_tensors": Program(),
        "feature_space": Program(),
        "timeseries": Program(),
        "pydataset": Program(),
        "generator": Program(),
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
        "saving": unless(Ends.REFUSED, CHECKPOINT, SERVERS),
        "custom_loop": unless(Ends.EQUAL, FOR_ITSELF, *WORKERS),
        "train_on_batch": unless(Ends.EQUAL, FOR_ITSELF, *WORKERS),
        "mirrored_scope": Program(),
        "multi_worker_scope": Program(),
        "distributed_loop": unless(Ends.REFUSED, LOOP, "horovod-2", SERVERS),
    },
}
PROGRAMS = {name: program for family in FAMILIES.values() for name, program in family.items()}

# What says no to them is in the processes that `tfdist run --drop-in` starts.
FROM_THE_COMMAND_LINE = ("custom_loop", "train_on_batch")


# In `make test-full` only: other programs, or tests/equivalence, have what is special in them.
LIKE_OTHERS = (
    "diffusion", "digits_convnet", "distillation", "gan", "generator", "mixed_precision",
    "pydataset", "several_outputs", "siamese", "text", "timeseries", "transformer", "tuner",
    "vae", "wgan_gp", "feature_space", "lora", "metric_learning", "pairs_in_batch",
    "stateful_rnn",
)  # fmt: skip


def always() -> set[tuple[str, str]]:
    """Gives the programs and places of `make test`: those of a family take turns."""
    chosen = set()
    for first, family in enumerate(FAMILIES.values()):
        for turn, (name, program) in enumerate(family.items(), start=first):
            runs = [place for place in SEVERAL if program.on(place).ends is not Ends.FAILS]
            if runs and name not in LIKE_OTHERS:
                chosen.add((name, runs[turn % len(runs)]))
    return chosen
