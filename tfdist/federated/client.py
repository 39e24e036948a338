"""The local steps of one client on a replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.federated.protection import LocalStep
from tfdist.federated.source import Batch
from tfdist.federated.state import LocalState

Tensor = Any


class _Proximal:
    """Adds mu * (y - w) to gradients before an optimizer applies them; see FedProx.

    Args:
        proximal: The factor mu.
        start: The weights w from which the client started, by the id of their variables.
    """

    def __init__(self, proximal: float, start: dict[int, Tensor]) -> None:
        self._proximal = proximal
        self._start = start

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Returns the loss as it is: a client's batch is a whole one."""
        return loss

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Applies the gradients, with the proximal term."""
        if self._proximal:
            scale = getattr(optimizer, "dynamic_scale", None)
            pairs = zip(grads, variables, strict=True)
            grads = [g if g is None else self._pulled(g, v, scale) for g, v in pairs]
        update(grads)

    def pull(self, variable: Any) -> Tensor | None:
        """Returns mu * (y - w) for a variable, or None.

        Args:
            variable: A `keras.Variable`.
        """
        start = self._start.get(id(variable))
        if start is None or not self._proximal:
            return None
        return self._proximal * (tf.convert_to_tensor(variable) - start)

    def _pulled(self, gradient: Tensor, variable: Any, scale: Any) -> Tensor:
        pull = self.pull(variable)
        if pull is None:
            return gradient
        if scale is not None:
            pull *= tf.cast(tf.convert_to_tensor(scale), pull.dtype)
        return tf.convert_to_tensor(gradient) + tf.cast(pull, gradient.dtype)


class ClientSteps:
    """Makes local steps: Keras's own `train_step` on a batch of one client, without others.

    Args:
        model: A compiled, built `keras.Model`.
        state: The state that the steps change.
        proximal: As in `FedAvg`.
        protected: Whether what one client does must not show in the steps of another.
        local: The private step that replaces Keras's, or None.
    """

    def __init__(
        self,
        model: Any,
        state: LocalState,
        proximal: float,
        protected: bool = False,
        local: LocalStep | None = None,
    ) -> None:
        self._model = model
        self._protected = protected
        self._local = local
        self._state = state
        self._proximal = proximal
        self._train_step = _keras.step_of(model, "train_step")
        # The structure of a step's logs, and the metric and number of each leaf.
        self._logs: Any = {}
        self._of_metrics: list[tuple[Any, int]] = []

    def make(
        self,
        batch: Batch,
        start: Sequence[Tensor],
        steps_before: Tensor,
        place: tuple[Tensor, Tensor],
    ) -> None:
        """Makes a local step.

        Args:
            batch: The batch.
            start: The values of `LocalState.trained` from which the client started.
            steps_before: Scalar int64, where schedules of learning rates begin.
            place: The number of the client, and of its local step in the round.
        """
        variables = self._state.trained
        of_start = {id(v): w for v, w in zip(variables, start, strict=True)}
        # A whole batch of one process: nothing is summed with other replicas.
        of_client = _keras.ReplicaBatch(
            batch.rows, batch.rows, tf.constant(0, tf.int64), list, lambda tensor: tensor
        )
        proximal = _Proximal(self._proximal, of_start)
        with _keras.on_replica(of_client), _later(self._state.optimizers, steps_before):
            if self._local is not None:
                part, logs = self._private(self._local, batch, of_client, proximal, place)
            else:
                of_client.updates = proximal
                with _keras.tracing_part() as part:
                    logs = self._train_step(batch.data)
            of_client.updates = None
        self._state.check_touched([variable for variable, _ in of_client.touched.values()])
        self._state.check_traced(part, self._protected)
        self._note_logs(of_client, logs)

    def _private(
        self,
        local: LocalStep,
        batch: Batch,
        of_client: Any,
        proximal: _Proximal,
        place: tuple[Tensor, Tensor],
    ) -> tuple[Any, Any]:
        """Makes a private step. One without rows has noise alone, and adds to no metric."""
        step = local.of_client(*place, proximal.pull)
        nothing = tf.zeros([4])
        data, _ = step.begin_step(batch.data, of_client, nothing)
        # The step adds the proximal term itself, after it has divided the noisy sum.
        of_client.updates = _Proximal(0.0, {})
        metrics = [(v, tf.identity(tf.convert_to_tensor(v))) for v in self._state.metrics]
        with _keras.tracing_part() as part:
            logs = step.train_step(data, of_client, tf.zeros([0], tf.int64))
        for variable, before in metrics:
            after = tf.convert_to_tensor(variable)
            variable.assign(tf.where(batch.rows > 0, after, before))
        return part, logs

    def requests(self, stopping: Tensor) -> Tensor:
        """Returns `stopping`, which asks all workers to stop if a private step must not count.

        Args:
            stopping: The worker's signals to the other workers, see `StopState`.
        """
        return stopping if self._local is None else self._local.requests(stopping)

    def _note_logs(self, batch: Any, logs: Any) -> None:
        entries = [batch.metric_of(leaf) for leaf in tf.nest.flatten(logs)]
        if None in entries:
            names = [name for name in logs if batch.metric_of(logs[name]) is None]
            raise ArgumentError(
                "In federated training the logs of a `train_step` must be results of metrics, "
                f"which can be computed over all clients. Received: {names}. Track each by a "
                "keras.metrics.Mean, and return its result."
            )
        self._logs = tf.nest.map_structure(lambda leaf: 0, logs)
        self._of_metrics = entries

    def logs(self) -> Any:
        """Returns the logs of a round, from the present state of the metrics."""
        if not self._of_metrics:  # in eager mode, a replica without a client has no logs
            return self._model.get_metrics_result()
        results = {id(m): tf.nest.flatten(m.result()) for m, _ in self._of_metrics}
        leaves = [results[id(metric)][number] for metric, number in self._of_metrics]
        return tf.nest.pack_sequence_as(self._logs, leaves)


def _later(optimizers: Sequence[Any], steps: Tensor) -> Any:
    return _keras.schedules_after(optimizers, steps)
