"""What a strategy must answer, with a default for all that one process needs not care about."""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from tfdist.cluster import Cluster
from tfdist.cluster.key_value_store import KeyValueStore

Tensor = Any


@dataclass(frozen=True)
class Place:
    """Where this process's replicas stand among all.

    Attributes:
        num_replicas: Copies of the model, over all workers.
        first_replica: Global number of this process's first replica.
        local_replicas: Replicas of this process, numbered from `first_replica` on.
        num_workers: Processes.
        worker_index: This process's number; 0 is the chief.
    """

    num_replicas: int = 1
    first_replica: int = 0
    local_replicas: int = 1
    num_workers: int = 1
    worker_index: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.worker_index == 0


@dataclass(frozen=True)
class Functions:
    """What Keras's loop calls instead of what it would build for itself.

    Attributes:
        train: Makes the next steps of an epoch of shares, and returns logs.
        test: The same, for evaluation.
        predict: Gives the outputs for a list of shares.
        running: Makes a context that lasts as long as Keras's loop.
        timers: Clocks inside of the steps, if they have some.
    """

    train: Callable[[Any], Any]
    test: Callable[[Any], Any]
    predict: Callable[[list[Any]], Any]
    running: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    timers: Any = None


class Strategy(abc.ABC):
    """How training is spread over devices and processes.

    A subclass sets `name`, takes a `Cluster` in its constructor and sets `place` there,
    answers `unavailable` and `chosen_by` without touching a device, and overrides what
    differs from one process with one device. Code inside `run` is in a replica: it may call
    `replica_id`, `all_reduce_sum` and `all_gather`.

    Attributes:
        name: What the user passes as `strategy=`.
        priority: `auto` asks strategies in falling order of this number.
        place: Where this process's replicas stand; changes only in `reconnect`.
        is_plain: Whether one process trains its own variables, as Keras alone does.
        elastic: Whether processes may come and go while training goes on.
        has_servers: Whether `hold` leaves variables where no replica is.
        gathers_rows: Whether its own functions take row numbers where data has rows.
        sums_exactly: Whether `reduce_step` sums gradients as they are.
        sums_gradients: Whether `reduce_step` is linear in the gradients.
        compression: Of gradients, where `fit` asks for none; as in `fit`.
        predivide: By what gradients in half precision are divided before they are summed.
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    place: Place
    is_plain: bool = False
    elastic: bool = False
    has_servers: bool = False
    gathers_rows: bool = False
    sums_exactly: bool = True
    sums_gradients: bool = True
    compression: str | None = None
    predivide: float = 1.0

    @classmethod
    @abc.abstractmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why the strategy cannot run in this process, with the remedy, or None."""

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Says why `auto` should choose this strategy here, or None."""
        return None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs `function` once on every local replica.

        Args:
            function: Called with `args`, each replica seeing its part of per-replica values.
            *args: What `distribute`'s iterator gave, or the same value for all.

        Returns:
            What the first local replica returned.
        """
        return function(*args)

    def replica_id(self) -> Tensor:
        """The global number of the replica that is running, a scalar int32 tensor or an int."""
        return self.place.first_replica

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over all replicas, every replica getting the result.

        Args:
            tensors: Dense tensors of any dtypes, or `tf.IndexedSlices`.
        """
        return list(tensors)

    def reduce_step(
        self,
        gradients: Sequence[Tensor],
        others: Sequence[Tensor],
        share: Tensor,
        variables: Sequence[Any],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums what replicas contribute to a step: gradients, metrics' state and signals.

        Args:
            gradients: Each replica's part of the gradients, their sum the whole; dense, or
                `tf.IndexedSlices`. A strategy may reduce them in a way that is not exact,
                if the user asked for it.
            others: To be summed exactly.
            share: Scalar float32, the replica's part of the global batch, by which its
                gradients were multiplied.
            variables: The `keras.Variable` of each gradient.
        """
        reduced = self.all_reduce_sum([*gradients, *others])
        return reduced[: len(gradients)], reduced[len(gradients) :]

    def update(self, action: Callable[[], None]) -> None:
        """Updates variables with what was reduced, on this replica.

        Args:
            action: Assigns the same values on every replica.
        """
        action()

    def signals_lead(self, elements: int) -> bool:
        """Tells whether the workers' signals go ahead of a step, in a collective of their own.

        They cost least with the gradients. Known ahead, they let each variable be updated
        while the gradient of another still travels.

        Args:
            elements: Of all the gradients of the step.
        """
        return False

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every replica along axis 0, in the order of replicas.

        Args:
            tensor: Shape [rows, ...]; `rows` may differ between replicas.
        """
        return tensor

    def distribute(self, dataset: Callable[[], Any]) -> Iterable[Any]:
        """Turns this process's stream of shares into one that `run` deals out to replicas.

        Args:
            dataset: Builds a `tf.data.Dataset` whose elements are the shares of the local
                replicas in turn, `place.local_replicas` elements a step.
        """
        made: Iterable[Any] = dataset()
        return made

    def next_share(self, iterator: Any) -> Any:
        """Draws from `distribute`'s iterator what `run` deals out.

        Args:
            iterator: The iterator.
        """
        return iterator.get_next()

    def own_functions(self, model: Any) -> Functions | None:
        """Makes what Keras's loop calls, where steps are not replicas' shares of one batch.

        Args:
            model: A compiled, built `keras.Model`, its variables held by the strategy.

        Returns:
            The functions, or None for those of all other strategies.
        """
        return None

    def describe(self, batch_size: int | None) -> str:
        """Says how many replicas there are and how a batch is split, a few words.

        Args:
            batch_size: Examples of a full global batch, if known.
        """
        replicas = self.place.num_replicas
        if replicas == 1:
            return "1 replica"
        if batch_size is None:
            return f"{replicas} replicas"
        edges = [batch_size * r // replicas for r in range(replicas + 1)]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        split = (
            " + ".join(map(str, sizes))
            if replicas <= 4
            else " + ".join(f"{n} x {size}" for size, n in sorted(Counter(sizes).items()))
        )
        return f"{replicas} replicas, batch {batch_size} = {split}"

    def summary(self) -> str | None:
        """Says what the user should know after a training, or None."""
        return None

    def join(self) -> None:  # noqa: B027, only elastic strategies have anything to join
        """Begins to exchange with the others: until then each is alone."""

    def reconnect(self) -> None:  # noqa: B027
        """Finds the processes that are there now; they `join` anew."""

    def members_watched(
        self, on_change: Callable[[], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which a launcher's news of processes are heard.

        Args:
            on_change: Called, from any thread, when processes came or are about to go.
        """
        return contextlib.nullcontext()

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which `variables` live where the replicas can update them.

        It can be entered again and again, and is to be kept with the functions traced in
        it. On leaving, each `keras.Variable` is the plain variable it was, with the
        trained value.

        Args:
            variables: `keras.Variable`s, built.
            optimizers: The optimizers among whose variables they are.
        """
        return contextlib.nullcontext()

    def copies(self, variable: Any) -> list[Any]:
        """Gives the values of a variable that the replicas of this process hold, as arrays.

        Args:
            variable: A `keras.Variable`, held by the strategy.
        """
        return [np.asarray(keras.ops.convert_to_numpy(variable))]

    def assign_copies(self, variable: Any, values: Sequence[Any]) -> None:
        """Gives each replica of this process a value of its own.

        Args:
            variable: A `keras.Variable`, held by the strategy.
            values: Arrays, as `copies` gives them.
        """
        variable.assign(values[0])

    def agree(self, variables: Sequence[Any]) -> None:  # noqa: B027, one process agrees
        """Gives `variables` the chief's values on every worker.

        Args:
            variables: `keras.Variable`s, in the same order on every worker.
        """

    def gather_objects(self, value: Any) -> list[Any]:
        """Collects a small picklable object of every worker, in the order of workers.

        Args:
            value: This worker's object.
        """
        return [value]

    def key_value_store(self) -> KeyValueStore | None:
        """Gives the store in which workers leave notes for each other, if there is one.

        It works from another thread while this process waits in a collective.
        """
        return None

    def silent(self) -> list[str]:
        """Names processes of the run that do not answer now, where one can ask them."""
        return []

    def waiting_for(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Makes a context that limits how long this process waits for others.

        Args:
            what: What it waits for, for the message.
        """
        return contextlib.nullcontext()

    def explaining_losses(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context, around a whole training, that says what a lost process means."""
        return contextlib.nullcontext()

    def broadcast_object(self, value: Any) -> Any:
        """Gives every worker the chief's object.

        Args:
            value: A picklable object; only the chief's is used.
        """
        return self.gather_objects(value)[0]
