"""The interface of a strategy. The defaults fit a single process."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.strategies.collectives import Collectives
from tfdist.strategies.gathered_groups import Groups
from tfdist.strategies.place import Place

__all__ = ["Functions", "Groups", "Place", "Strategy", "Tensor"]

Tensor = Any


@dataclass(frozen=True)
class Functions:
    """The functions that Keras's loop calls instead of its own compiled functions.

    Attributes:
        train: Runs the next training steps of an epoch, and returns logs.
        test: The same, for evaluation.
        predict: Returns the outputs for a list of per-replica batches.
        running: Makes a context that lasts as long as Keras's loop.
        timers: The step timers, if the steps have any.
    """

    train: Callable[[Any], Any]
    test: Callable[[Any], Any]
    predict: Callable[[list[Any]], Any]
    running: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    timers: Any = None


class Strategy(Collectives):
    """Distributes training over devices and processes.

    A subclass sets `name`. Its constructor takes a `Cluster` and sets `place`. It answers
    `unavailable` and `chosen_by` without touching a device. It overrides the methods whose
    defaults, made for one process with one device, do not fit. A function that `run` calls
    runs in a replica: it may call `replica_id`, `all_reduce_sum` and `all_gather`.

    Attributes:
        name: The value that you pass as `strategy=`.
        priority: "auto" asks the strategies in descending order of this number.
        place: The replicas of this process. Only `reconnect` changes it.
        is_plain: Whether a single process trains its own variables, as Keras alone does.
        synchronous: Whether all replicas make each step together.
        elastic: Whether processes may join and leave during training.
        has_servers: Whether `hold` moves variables to processes without a replica.
        has_stages: Whether each device computes some of the layers, of every batch.
        gathers_rows: Whether the functions of `own_functions` take row numbers instead of
            rows, where the data set has rows.
        sums_exactly: Whether `reduce_step` sums gradients without loss.
        sums_gradients: Whether `reduce_step` is linear in the gradients.
        compression: The compression of gradients that applies if `fit` gets none.
        predivide: The divisor of gradients in half precision before they are summed.
        exchanges_parts: Whether each replica can get its part of a sum, as in `sum_of_part`.
        strategy: The `tf.distribute.Strategy` that does the work, if there is one.
        compiles: Whether XLA may compile the step of a single replica.
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    place: Place
    is_plain: bool = False
    synchronous: bool = True
    elastic: bool = False
    has_servers: bool = False
    has_stages: bool = False
    gathers_rows: bool = False
    sums_exactly: bool = True
    sums_gradients: bool = True
    compression: str | None = None
    predivide: float = 1.0
    exchanges_parts: bool = True
    strategy: Any = None
    compiles: bool = True

    @classmethod
    @abc.abstractmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns why the strategy cannot run in this process, with the remedy, or None."""

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns why `auto` should choose this strategy here, or None."""
        return None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs `function` once on every local replica.

        Args:
            function: Called with `args`. Of a per-replica value, each replica gets its part.
            *args: Elements of `distribute`'s iterator, or values equal for all replicas.

        Returns:
            The result of the first local replica.
        """
        return function(*args)

    def reduce_step(
        self,
        gradients: Sequence[Tensor],
        exact_tensors: Sequence[Tensor],
        share: Tensor,
        variables: Sequence[Any],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums the replicas' contributions to a step: gradients, metric state and signals.

        Args:
            gradients: This replica's gradients, dense or `tf.IndexedSlices`. The sum over
                the replicas is the gradient of the global batch. If the user asked for it,
                the reduction may be lossy.
            exact_tensors: Tensors whose sum must be exact.
            share: Scalar float32, the replica's fraction of the global batch. The gradients
                are multiplied by it already.
            variables: The `keras.Variable` of each gradient.
        """
        reduced = self.all_reduce_sum([*gradients, *exact_tensors])
        return reduced[: len(gradients)], reduced[len(gradients) :]

    def update(self, action: Callable[[], None]) -> None:
        """Updates variables with the reduced tensors, on this replica.

        Args:
            action: Assigns variables. It assigns the same values on every replica.
        """
        action()

    def signals_lead(self, elements: int) -> bool:
        """Returns whether the workers' signals are reduced before the gradients of a step.

        A collective together with the gradients is cheapest. An earlier collective lets
        each variable be updated while the gradients of others are still being reduced.

        Args:
            elements: Number of elements of all gradients of the step.
        """
        return False

    def distribute(self, dataset: Callable[[], Any]) -> Iterable[Any]:
        """Turns this process's per-replica batches into elements for `run`.

        Args:
            dataset: Builds a `tf.data.Dataset` whose elements are per-replica batches:
                `place.local_replicas` elements a step, in the replicas' order.
        """
        batches: Iterable[Any] = dataset()
        return batches

    def next_share(self, iterator: Any) -> Any:
        """Returns the next argument for `run`.

        Args:
            iterator: An iterator over what `distribute` returned.
        """
        return iterator.get_next()

    def own_functions(self, model: Any) -> Functions | None:
        """Makes the functions for Keras's loop, if replicas do not split one global batch.

        Args:
            model: A compiled, built `keras.Model`, inside `hold`.

        Returns:
            The functions, or None for the functions of `tfdist.step`.
        """
        return None

    def describe(self, batch_size: int | None) -> str:
        """Returns how many replicas there are and how a batch is split, in a few words.

        Args:
            batch_size: Number of examples of a full global batch, if known.
        """
        return self.place.describe(batch_size)

    def summary(self) -> str | None:
        """Returns a line for the user at the end of a training, or None."""
        return None

    def join(self) -> None:
        """Begins the collectives of an elastic run. Until then this process is alone."""

    def reconnect(self) -> None:
        """Connects the processes that are there now. They must `join` again."""

    def members_watched(
        self, on_change: Callable[[], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which this process hears of changes from the launcher.

        Args:
            on_change: Called, from any thread, when processes have joined or will leave.
        """
        return contextlib.nullcontext()

    def examine(self, model: Any) -> None:
        """Prepares for a model, whose variables `hold` gets next.

        Args:
            model: A built `keras.Model`.
        """

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which `variables` live where the replicas can update them.

        The context can be entered several times. Functions traced in it need the same
        context. At its end, each `keras.Variable` has its former backing variable again,
        with the trained value.

        Args:
            variables: Built `keras.Variable`s.
            optimizers: The optimizers that own some of these variables.
        """
        return contextlib.nullcontext()

    def make_variable(self, value: Tensor, name: str, trainable: bool = False) -> Any:
        """Makes a backing variable of which each replica of this process has its own value.

        Args:
            value: The initial value on all of them.
            name: Its name.
            trainable: Whether a `tf.GradientTape` watches it by itself.
        """
        return tf.Variable(value, trainable=trainable, name=name)

    def local_tensors(self, variable: Any) -> list[Tensor]:
        """Returns a variable's value on each replica of this process, not copied.

        Args:
            variable: A `keras.Variable`, inside `hold`.
        """
        return [tf.convert_to_tensor(variable)]

    def copies(self, variable: Any) -> list[Any]:
        """Returns a variable's value on each replica of this process, as arrays.

        Args:
            variable: A `keras.Variable`, inside `hold`.
        """
        return [np.asarray(value) for value in self.local_tensors(variable)]

    def assign_copies(self, variable: Any, values: Sequence[Any]) -> None:
        """Assigns a value of its own to each replica of this process.

        Args:
            variable: A `keras.Variable`, inside `hold`.
            values: Arrays, as `copies` returns them.
        """
        variable.assign(values[0])

    def agree(self, variables: Sequence[Any]) -> None:
        """Assigns the chief's values to `variables` on every worker.

        Args:
            variables: `keras.Variable`s, in the same order on every worker.
        """

    def gather_objects(self, value: Any) -> list[Any]:
        """Collects a small picklable object of every worker, in the workers' order.

        Args:
            value: This worker's object.
        """
        return [value]

    def key_value_store(self) -> KeyValueStore | None:
        """Returns the key-value store of the workers, if there is one.

        Another thread can use it while this process waits in a collective.
        """
        return None

    def silent(self) -> list[str]:
        """Names the processes of the run that do not answer now, if they can be asked."""
        return []

    def waiting_for(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Makes a context that limits how long this process waits for its peers.

        Args:
            what: Names the operation it waits for, for the message.
        """
        return contextlib.nullcontext()

    def explaining_losses(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context, around a whole training, that explains the loss of a process."""
        return contextlib.nullcontext()

    def broadcast_object(self, value: Any) -> Any:
        """Returns the chief's object on every worker.

        Args:
            value: A picklable object. Only the chief's is used.
        """
        return self.gather_objects(value)[0]
