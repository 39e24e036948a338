"""Per-example gradients of recurrent layers, from their gates' inputs at each time step.

A gate's input is x_t W + h_(t-1) U + b, so the gradients by W, U and b are products of x_t,
h_(t-1) and 1 with the gradient by that input, summed over time. Keras does not expose those
gradients, so the layer is computed once more, for all examples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras import layers

from tfdist.privacy.mechanism.parts import GradientPart, Product, Written

Tensor = Any
_LAYERS = (layers.LSTM, layers.GRU, layers.SimpleRNN, layers.RNN)
# A step's function of the cell, the gates' inputs from x, those from h, and the states.
_Step = Callable[[Any, Tensor, Tensor, list[Tensor]], list[Tensor]]


def has_form(layer: Any) -> bool:
    """Returns whether `of_recurrent` can compute a recurrent layer.

    Args:
        layer: A built `keras.layers.RNN`.
    """
    cell = layer.cell
    if type(layer) not in _LAYERS or type(cell) not in _STEPS or layer.stateful:
        return False
    if cell.compute_dtype != layer.compute_dtype:
        return False
    drops_all = cell.dropout == 1 or cell.recurrent_dropout == 1
    # Without `reset_after`, a GRU multiplies h by the reset gate before the kernel does, so the
    # factor of the kernel is not h.
    return bool(getattr(cell, "reset_after", True)) and not drops_all


def of_recurrent(layer: Any, calls: Sequence[Any]) -> list[GradientPart] | None:
    """Returns the gradients by the weights of an LSTM, a GRU or a SimpleRNN.

    Args:
        layer: A layer for which `has_form` is true.
        calls: Its calls, as `closed_forms.RecordedCall`s.

    Returns:
        The gradients, or None if masks of dropout cannot be drawn again.
    """
    cell = layer.cell
    if (cell.dropout or cell.recurrent_dropout) and not all(call.seeds for call in calls):
        return None
    results = [_of_call(layer, call) for call in calls]
    inputs, states = (_joined([factors[n] for factors, _, _ in results]) for n in range(2))
    by_gates = tf.concat([by for _, by, _ in results], 1)
    by_inner = tf.concat([by for _, _, by in results], 1)
    parts = [
        _of_gates(cell.kernel, inputs, by_gates),
        _of_gates(cell.recurrent_kernel, states, by_inner),
    ]
    if cell.use_bias:
        sums = [tf.reduce_sum(by_gates, 1), tf.reduce_sum(by_inner, 1)]
        has_two = len(cell.bias.shape) == 2  # a GRU has one bias for x and one for h
        parts.append(Written(cell.bias, tf.stack(sums, 1) if has_two else sums[0]))
    return parts


def _joined(calls: list[list[Tensor]]) -> list[Tensor]:
    """Concatenates the gates' factors of several calls.

    A call with dropout has one factor for each gate, and a call without has one for all.
    """
    most_factors = max(len(factors) for factors in calls)
    repeated = [factors * (most_factors // len(factors)) for factors in calls]
    return [tf.concat(of_gate, 1) for of_gate in zip(*repeated, strict=True)]


def _of_gates(variable: Any, factors: list[Tensor], by: Tensor) -> GradientPart:
    """Returns the gradients by a kernel, whose gates have one factor, or one each."""
    if len(factors) == 1:
        return Product(variable, factors[0], by)
    # With dropout, each gate has its own mask of the inputs.
    split = zip(factors, tf.split(by, len(factors), 2), strict=True)
    products = [tf.matmul(factor, of_gate, transpose_a=True) for factor, of_gate in split]
    return Written(variable, tf.concat(products, 2))


def _of_call(layer: Any, call: Any) -> tuple[Any, Tensor, Tensor]:
    """Returns the gates' factors from x and h, and the gradients by both gates' inputs."""
    cell = layer.cell
    dtype = tf.as_dtype(layer.compute_dtype)  # so that values are rounded as in the layer
    x = tf.cast(call.inputs, dtype)
    mask = call.argument(2, "mask")
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    if layer.go_backwards:
        x = tf.reverse(x, [1])
        mask = None if mask is None else tf.reverse(mask, [1])
    states = tf.nest.flatten(call.argument(1, "initial_state"))
    if not states or states[0] is None:
        states = layer.get_initial_state(tf.shape(x)[0])
    states = [tf.cast(state, dtype) for state in tf.nest.flatten(states)]
    of_inputs, of_states = _dropout_masks(layer, call, x, states)
    inputs = [x if m is None else x * m[:, None] for m in of_inputs]
    kernel, recurrent = (_value(v, dtype) for v in (cell.kernel, cell.recurrent_kernel))
    gates = tf.transpose(_times(inputs, kernel), [1, 0, 2])
    inner = tf.zeros_like(gates)
    if cell.use_bias:
        bias = _value(cell.bias, dtype)
        gates += bias[0] if len(bias.shape) == 2 else bias
        inner += bias[1] if len(bias.shape) == 2 else 0.0

    def from_state(h: Tensor) -> Tensor:
        return _times([h if m is None else h * m for m in of_states], recurrent)

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([gates, inner])
        outputs, previous_h, last = _run(layer, gates, inner, from_state, states, mask)
        results = [outputs if layer.return_sequences else outputs[:, -1]]
        results += last if layer.return_state else []
    gradients = [tf.cast(g, dtype) for g in tf.nest.flatten(call.gradients)]
    by = tape.gradient(
        results,
        [gates, inner],
        gradients,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    by_gates, by_inner = (tf.transpose(tf.convert_to_tensor(g), [1, 0, 2]) for g in by)
    hidden = [previous_h if m is None else previous_h * m[:, None] for m in of_states]
    # Sums over time are in float32.
    inputs, hidden = ([tf.cast(t, tf.float32) for t in ts] for ts in (inputs, hidden))
    return (inputs, hidden), tf.cast(by_gates, tf.float32), tf.cast(by_inner, tf.float32)


def _dropout_masks(layer: Any, call: Any, x: Tensor, states: list[Tensor]) -> list[list[Any]]:
    """Returns a call's dropout masks of x and h: one for each gate, one for all, or [None].

    They are drawn again, from the same seeds and keys of rows.
    """
    cell = layer.cell
    has_dropout = cell.dropout or cell.recurrent_dropout
    if not (has_dropout and call.argument(3, "training")):
        return [[None], [None]]
    with keras.StatelessScope(state_mapping=call.seeds):
        try:
            of_inputs = cell.get_dropout_mask(x[:, 0])
            of_states = cell.get_recurrent_dropout_mask(states[0])
        finally:
            cell.reset_dropout_mask()
            cell.reset_recurrent_dropout_mask()
    return [[m] if m is None or tf.is_tensor(m) else list(m) for m in (of_inputs, of_states)]


def _times(factors: list[Tensor], kernel: Tensor) -> Tensor:
    """Multiplies a factor, or a factor for each gate, by a kernel."""
    # XLA does not compile `tensordot` within a loop.
    multiply = tf.matmul if factors[0].shape.rank == 2 else partial(tf.tensordot, axes=1)
    split = zip(factors, tf.split(kernel, len(factors), 1), strict=True)
    products = [multiply(factor, part) for factor, part in split]
    return products[0] if len(products) == 1 else tf.concat(products, -1)


def _run(
    layer: Any,
    gates: Tensor,
    inner: Tensor,
    from_state: Callable[[Tensor], Tensor],
    states: list[Tensor],
    mask: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Runs the layer over time, as Keras does.

    Returns:
        The outputs and the h before each step, both of shape [examples, time, ...], and the
        last states.
    """
    steps = gates.shape[0] if gates.shape[0] is not None else tf.shape(gates)[0]
    step = _STEPS[type(layer.cell)]

    def read(values: Tensor) -> Any:
        return tf.TensorArray(values.dtype, size=steps).unstack(values)

    of_gates, of_inner = read(gates), read(inner)
    of_mask = None if mask is None else read(tf.transpose(mask)[:, :, None])
    empty_arrays = [tf.TensorArray(gates.dtype, size=steps) for _ in range(2)]

    def body(time: Tensor, output: Tensor, states: list[Tensor], arrays: list[Any]) -> Any:
        from_h = from_state(states[0]) + of_inner.read(time)
        next_states = step(layer.cell, of_gates.read(time), from_h, states)
        next_output = next_states[0]
        if of_mask is not None:
            counts = of_mask.read(time)
            masked = tf.zeros_like(next_output) if layer.zero_output_for_mask else output
            next_output = tf.where(counts, next_output, masked)
            pairs = zip(next_states, states, strict=True)
            next_states = [tf.where(counts, new, old) for new, old in pairs]
        arrays = [arrays[0].write(time, next_output), arrays[1].write(time, states[0])]
        return time + 1, next_output, next_states, arrays

    _, _, last, arrays = tf.while_loop(
        lambda time, *_: time < steps,
        body,
        (tf.constant(0), tf.zeros_like(states[0]), states, empty_arrays),
        maximum_iterations=steps,
    )
    outputs, previous_h = (tf.transpose(array.stack(), [1, 0, 2]) for array in arrays)
    return outputs, previous_h, last


def _lstm(cell: Any, gates: Tensor, from_h: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, c, o = tf.split(gates + from_h, 4, 1)
    sigma = cell.recurrent_activation
    carry = sigma(f) * states[1] + sigma(i) * cell.activation(c)
    return [sigma(o) * cell.activation(carry), carry]


def _gru(cell: Any, gates: Tensor, from_h: Tensor, states: list[Tensor]) -> list[Tensor]:
    (z, r, h), (of_z, of_r, of_h) = (tf.split(part, 3, 1) for part in (gates, from_h))
    sigma = cell.recurrent_activation
    update = sigma(z + of_z)
    candidate = cell.activation(h + sigma(r + of_r) * of_h)
    return [update * states[0] + (1 - update) * candidate]


def _simple(cell: Any, gates: Tensor, from_h: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [cell.activation(gates + from_h)]


_STEPS: dict[type, _Step] = {
    layers.LSTMCell: _lstm,
    layers.GRUCell: _gru,
    layers.SimpleRNNCell: _simple,
}


def _value(variable: Any, dtype: Any) -> Tensor:
    return tf.cast(tf.convert_to_tensor(variable), dtype)
