"""The gradient of a model that computes in micro-batches on several devices; see `piped`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist._keras.piped_units import MicroBatches, Unit
from tfdist._keras.second_passes import CallSurroundings, after, has_gradient

Tensor = Any
Recall = Callable[[Unit, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


class Backward:
    """Goes back through the stages and micro-batches of a step.

    Args:
        units: The units of each stage.
        batches: The micro-batches.
        recall: Calls a unit's layers again, with what it takes and the variables' values. None
            if tapes have recorded the units.
        surroundings: What calls depend on besides their arguments.
    """

    def __init__(
        self,
        units: list[list[Unit]],
        batches: MicroBatches,
        recall: Recall | None,
        surroundings: CallSurroundings,
    ) -> None:
        self._units = units
        self._batches = batches
        self._recall = recall
        self._surroundings = surroundings

    def gradients(self, of_inputs: Sequence[int], upstream: dict[int, Tensor]) -> list[Any]:
        """Returns the gradients of inputs, then of each stage's trainable variables.

        Args:
            of_inputs: The ids of the inputs.
            upstream: The gradients of the model's outputs, by id.
        """
        of_batches: list[dict[int, list[Tensor]]] = []
        with tf.device(self._units[-1][0].stage.device):
            dense = {key: tf.convert_to_tensor(g) for key, g in upstream.items()}
            for number in range(self._batches.count):
                own = {k: [self._batches.slice_gradient(g, number)] for k, g in dense.items()}
                of_batches.append(own)
        by_stage = [self._of_stage(of_stage, of_batches) for of_stage in reversed(self._units)]
        input_gradients: list[Any] = []
        with tf.device(self._units[0][0].stage.device):
            for key in of_inputs:
                parts = [_total(gradients.get(key)) for gradients in of_batches]
                is_known = all(part is not None for part in parts)
                input_gradients.append(self._batches.join(parts) if is_known else None)
        return [*input_gradients, *(g for sums in reversed(by_stage) for g in sums)]

    def _of_stage(
        self, units: Sequence[Unit], of_batches: Sequence[dict[int, list[Tensor]]]
    ) -> list[Any]:
        """Returns the gradients of a stage's variables, and adds those of what it takes."""
        stage = units[0].stage
        sums: list[Any] = [None] * len(stage.trainable)
        before: list[Tensor] = []
        for unit, gradients in zip(units, of_batches, strict=True):
            of_taken, of_variables = self._of_unit(unit, gradients, before)
            for key, gradient in zip(stage.takes, of_taken, strict=True):
                if gradient is not None:
                    gradients.setdefault(key, []).append(gradient)
            with tf.device(stage.device):
                sums = [_sum(a, b) for a, b in zip(sums, of_variables, strict=True)]
            # Gradients of the model's inputs are not computed unless they are needed.
            last = of_variables if any(g is not None for g in of_variables) else of_taken
            before = [_a_tensor(gradient) for gradient in last if gradient is not None]
        return sums

    def _of_unit(
        self, unit: Unit, gradients: dict[int, list[Tensor]], before: Sequence[Tensor]
    ) -> tuple[list[Any], list[Any]]:
        """Returns the gradients of what a unit takes, and of its stage's variables."""
        stage = unit.stage
        pairs = [(i, _total(gradients.get(key))) for i, key in enumerate(stage.gives)]
        pairs = [(i, g) for i, g in pairs if g is not None and has_gradient(unit.results[i])]
        count = len(stage.takes)
        if not pairs:
            return [None] * count, [None] * len(stage.trainable)
        # One micro-batch at a time.
        with tf.device(stage.device), tf.control_dependencies(before):
            upstream = [tf.identity(tf.convert_to_tensor(g)) for _, g in pairs]
        taken, values, results, tape = unit.taken, unit.values, unit.results, unit.tape
        if self._recall is not None:
            with self._surroundings.restored(), tf.device(stage.device):
                taken, values = after(upstream, taken, values)
                with tf.GradientTape() as tape:
                    tape.watch([t for t in (*taken, *values) if has_gradient(t)])
                    results = self._recall(unit, taken, values)
        sources = [*taken, *(values[i] for i in stage.trainable)]
        numbers = [i for i, source in enumerate(sources) if has_gradient(source)]
        with tf.device(stage.device):
            gradients_of_sources = tape.gradient(
                [results[i] for i, _ in pairs],
                [sources[i] for i in numbers],
                output_gradients=upstream,
            )
        by_source: list[Any] = [None] * len(sources)
        for number, gradient in zip(numbers, gradients_of_sources, strict=True):
            by_source[number] = gradient
        return by_source[:count], by_source[count:]


def _a_tensor(gradient: Any) -> Tensor:
    """Returns a tensor of a gradient, dense or of some rows."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _total(gradients: Sequence[Tensor] | None) -> Any:
    """Sums the gradients of one tensor by its uses in several stages."""
    if not gradients:
        return None
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total + gradient
    return total


def _sum(first: Any, second: Any) -> Any:
    """Sums gradients of two micro-batches. Rows of sparse ones follow each other."""
    if first is None or second is None:
        return second if first is None else first
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in (first, second)):
        return tf.IndexedSlices(
            tf.concat([first.values, second.values], 0),
            tf.concat([first.indices, second.indices], 0),
            first.dense_shape,
        )
    return tf.convert_to_tensor(first) + tf.convert_to_tensor(second)
