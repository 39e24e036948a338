"""A model that computes a batch in micro-batches, one group of layers on each device.

The model's `call` is replaced. It calls the layers of each stage under the stage's device, for
one micro-batch after the other, and joins the outputs. So losses and metrics see whole batches.
Its gradient is computed in the same way, from the last stage to the first (GPipe: Huang et al.,
"GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019). Nothing
orders the stages but the tensors that they pass on, and each stage takes one micro-batch at a
time. That is the schedule.

All micro-batches of a step see the same variables. What the first one leaves in seeds counts.
Random numbers are those of the examples' positions in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from tensorflow.python.eager import record as _record

from tfdist._keras.model_graph import ends, functional_of
from tfdist._keras.piped_gradient import Backward
from tfdist._keras.piped_units import MicroBatches, PipedStage, Unit, keep_changes
from tfdist._keras.second_passes import CallSurroundings, has_gradient, tied

Tensor = Any
_CALL = "call"


def set_piped(
    model: Any, stages: Sequence[PipedStage] | None, microbatches: int, recomputes: bool
) -> None:
    """Makes a model compute in stages, or as ever.

    Relies on `Layer.__call__`, which looks up `call` on the instance.

    Args:
        model: A Sequential or functional model.
        stages: The stages, or None.
        microbatches: Into how many parts a batch is cut.
        recomputes: Whether the backward pass computes activations again.
    """
    attributes = vars(model)
    if isinstance(attributes.get(_CALL), _PipedCall):
        del attributes[_CALL]
    if stages is not None:
        # Not with `setattr`, which Keras watches for layers and variables.
        attributes[_CALL] = _PipedCall(model, stages, microbatches, recomputes)


class _PipedCall:
    """Takes the place of a model's `call`."""

    def __init__(
        self, model: Any, stages: Sequence[PipedStage], microbatches: int, recomputes: bool
    ) -> None:
        original = model.call
        functools.update_wrapper(self, original)
        self._original = original
        self._functional = functional_of(model)
        self._stages = stages
        self._microbatches = microbatches
        self._recomputes = recomputes

    def __call__(
        self, inputs: Any, training: Any = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        leaves = keras.tree.flatten(inputs)
        is_symbolic = _global_state.get_global_attribute("symbolic_scope") is not None
        if is_symbolic or mask is not None or not all(map(tf.is_symbolic_tensor, leaves)):
            return self._original(inputs, training=training, mask=mask, **kwargs)
        standardized = self._functional._standardize_inputs(inputs)
        ids, wanted = ends(self._functional)
        step = _PipedStep(self._stages, wanted, self._recomputes, training, kwargs)
        outputs = step.run(dict(zip(ids, standardized, strict=True)), self._microbatches)
        results = [outputs[key] for key in wanted]
        packed = keras.tree.pack_sequence_as(self._functional._outputs_struct, results)
        return packed[0] if isinstance(packed, list | tuple) and len(packed) == 1 else packed


class _PipedStep:
    """The forward pass of one batch, and its gradient.

    Args:
        stages: The stages.
        wanted: The ids of the model's outputs.
        recomputes: Whether the backward pass computes activations again.
        training: The argument `training` of the model's call.
        context: Other arguments that layers get.
    """

    def __init__(
        self,
        stages: Sequence[PipedStage],
        wanted: Sequence[int],
        recomputes: bool,
        training: Any,
        context: Any,
    ) -> None:
        self._stages = stages
        self._wanted = list(dict.fromkeys(wanted))
        self._recomputes = recomputes
        self._training = training
        self._context = context
        self._surroundings = CallSurroundings.now()
        self._is_trained = _record.could_possibly_record()

    def run(self, inputs: dict[int, Tensor], microbatches: int) -> dict[int, Tensor]:
        """Computes the outputs of a batch.

        Args:
            inputs: The inputs, by the ids of the model's `KerasTensor`s.
            microbatches: Into how many parts the batch is cut.

        Returns:
            The model's outputs, by id.
        """
        rows = tf.shape(next(iter(inputs.values())), tf.int64)[0]
        batches = MicroBatches(rows, microbatches)
        values = []
        for stage in self._stages:
            with tf.device(stage.device):
                values.append([tf.identity(variable._value) for variable in stage.variables])
        numbers = range(microbatches)
        tensors_of = [self._slices(batches, inputs, number) for number in numbers]
        described = [batches.batch(number) for number in numbers]
        units: list[list[Unit]] = []
        for stage, of_stage in zip(self._stages, values, strict=True):
            units.append([])
            for batch, tensors in zip(described, tensors_of, strict=True):
                before = units[-1][-1].results if units[-1] else []
                taken = [tensors[key] for key in stage.takes]
                masks = [getattr(tensor, "_keras_mask", None) for tensor in taken]
                # A stage takes one micro-batch at a time.
                with tf.device(stage.device), tf.control_dependencies(before):
                    taken = [tf.identity(tensor) for tensor in taken]
                unit = Unit(stage, batch, of_stage, taken, masks)
                self._compute(unit)
                tensors.update(zip(stage.gives, unit.results, strict=True))
                units[-1].append(unit)
            keep_changes(units[-1])
        outputs = self._joined(batches, tensors_of)
        if not self._is_trained:
            return outputs
        recall = self._recall if self._recomputes else None
        backward = Backward(units, batches, recall, self._surroundings)
        return self._with_gradient(backward, inputs, values, outputs)

    def _slices(
        self, batches: MicroBatches, tensors: dict[int, Tensor], number: int
    ) -> dict[int, Tensor]:
        sliced = {}
        with tf.device(self._stages[0].device):
            for key, tensor in tensors.items():
                sliced[key] = batches.slice(tensor, number)
                mask = getattr(tensor, "_keras_mask", None)
                if mask is not None:
                    sliced[key]._keras_mask = batches.slice(mask, number)
        return sliced

    def _compute(self, unit: Unit) -> None:
        """Computes what a stage gives for a micro-batch."""
        options = self._training, self._context
        if self._recomputes or not self._is_trained:
            unit.results, unit.changed = unit.call(unit.taken, unit.values, *options)
            return
        with tf.GradientTape() as unit.tape:
            unit.tape.watch([t for t in (*unit.taken, *unit.values) if has_gradient(t)])
            unit.results, unit.changed = unit.call(unit.taken, unit.values, *options)

    def _recall(
        self, unit: Unit, taken: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[Tensor]:
        results, _ = unit.call(taken, values, self._training, self._context)
        return results

    def _joined(
        self, batches: MicroBatches, tensors_of: Sequence[dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        """Joins the model's outputs for all micro-batches."""
        joined = {}
        for key in self._wanted:
            parts = [tensors[key] for tensors in tensors_of]
            masks = [getattr(part, "_keras_mask", None) for part in parts]
            with tf.device(self._stages[-1].device):
                joined[key] = batches.join(parts)
                if all(mask is not None for mask in masks):
                    joined[key]._keras_mask = batches.join(masks)
        return joined

    def _with_gradient(
        self,
        backward: Backward,
        inputs: dict[int, Tensor],
        values: list[list[Tensor]],
        outputs: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """Returns the outputs, whose gradients are computed stage by stage."""
        chosen = [key for key, tensor in outputs.items() if has_gradient(tensor)]
        of_inputs = [key for key, tensor in inputs.items() if has_gradient(tensor)]
        anchors = [inputs[key] for key in of_inputs]
        for stage, of_stage in zip(self._stages, values, strict=True):
            anchors += [of_stage[i] for i in stage.trainable]

        def gradient(*upstream: Tensor) -> list[Any]:
            return backward.gradients(of_inputs, dict(zip(chosen, upstream, strict=True)))

        with tf.device(self._stages[-1].device):
            results = tied(list(outputs.values()), anchors, gradient)
        return dict(zip(outputs, results, strict=True))
