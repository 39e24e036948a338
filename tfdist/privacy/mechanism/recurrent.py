"""Per-example gradients of recurrent layers, from their gates' inputs at each time step.

A gate's input is x_t W + h_(t-1) U + b, so the gradients by W, U and b are products of x_t,
h_(t-1) and 1 with the gradient by that input, summed over time. Keras does not show those
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
# What a step makes of the gates' inputs, the part from h alone, and the states.
_Step = Callable[[Any, Tensor, Tensor, list[Tensor]], list[Tensor]]


def has_form(layer: Any) -> bool:
    """Tells whether a recurrent layer is one that `of_recurrent` knows.

    Args:
        layer: A built `keras.layers.RNN`.
    """
    cell = layer.cell
    if type(layer) not in _LAYERS or type(cell) not in _STEPS or layer.stateful:
        return False
    if cell.compute_dtype != layer.compute_dtype:
        return False
    drops_all = cell.dropout == 1 or cell.recurrent_dropout == 1
    return bool(getattr(cell, "reset_after", True)) and not drops_all


def of_recurrent(layer: Any, calls: Sequence[Any]) -> list[GradientPart] | None:
    """Gives the gradients by the weights of an LSTM, a GRU or a SimpleRNN.

    Args:
        layer: One with `has_form`.
        calls: Its calls, as `closed_forms.LayerCall`s.

    Returns:
        None if masks of dropout cannot be drawn again.
    """
    cell = layer.cell
    if (cell.dropout or cell.recurrent_dropout) and not all(call.seeds for call in calls):
        return None
    found = [_of_call(layer, call) for call in calls]
    inputs, befores = (_joined([factors[n] for factors, _, _ in found]) for n in range(2))
    by_gates = tf.concat([by for _, by, _ in found], 1)
    by_inner = tf.concat([by for _, _, by in found], 1)
    parts = [
        _of_gates(cell.kernel, inputs, by_gates),
        _of_gates(cell.recurrent_kernel, befores, by_inner),
    ]
    if cell.use_bias:
        sums = [tf.reduce_sum(by_gates, 1), tf.reduce_sum(by_inner, 1)]
        two = len(cell.bias.shape) == 2  # a GRU has one for each of both parts
        parts.append(Written(cell.bias, tf.stack(sums, 1) if two else sums[0]))
    return parts


def _joined(calls: list[list[Tensor]]) -> list[Tensor]:
    """Joins what the gates saw in several calls, some of which may have dropped nothing."""
    most = max(len(factors) for factors in calls)
    every = [factors * (most // len(factors)) for factors in calls]
    return [tf.concat(of_gate, 1) for of_gate in zip(*every, strict=True)]


def _of_gates(variable: Any, factors: list[Tensor], by: Tensor) -> GradientPart:
    """Gives the gradients by a kernel whose gates see the same, or each its own."""
    if len(factors) == 1:
        return Product(variable, factors[0], by)
    split = zip(factors, tf.split(by, len(factors), 2), strict=True)
    each = [tf.matmul(seen, of_gate, transpose_a=True) for seen, of_gate in split]
    return Written(variable, tf.concat(each, 2))


def _of_call(layer: Any, call: Any) -> tuple[Any, Tensor, Tensor]:
    """Gives what gates saw of inputs and states, and the gradients by both their parts."""
    cell = layer.cell
    dtype = tf.as_dtype(layer.compute_dtype)  # rounded as in the layer itself
    seen = tf.cast(call.inputs, dtype)
    mask = call.argument(2, "mask")
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    if layer.go_backwards:
        seen = tf.reverse(seen, [1])
        mask = None if mask is None else tf.reverse(mask, [1])
    states = tf.nest.flatten(call.argument(1, "initial_state"))
    if not states or states[0] is None:
        states = layer.get_initial_state(tf.shape(seen)[0])
    states = [tf.cast(state, dtype) for state in tf.nest.flatten(states)]
    of_inputs, of_states = _dropped(layer, call, seen, states)
    inputs = [seen if m is None else seen * m[:, None] for m in of_inputs]
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
        outputs, before, last = _run(layer, gates, inner, from_state, states, mask)
        made = [outputs if layer.return_sequences else outputs[:, -1]]
        made += last if layer.return_state else []
    given = [tf.cast(g, dtype) for g in tf.nest.flatten(call.gradients)]
    by = tape.gradient(
        made, [gates, inner], given, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    by_gates, by_inner = (tf.transpose(tf.convert_to_tensor(g), [1, 0, 2]) for g in by)
    befores = [before if m is None else before * m[:, None] for m in of_states]
    # What is summed over time is summed in float32.
    inputs, befores = ([tf.cast(t, tf.float32) for t in each] for each in (inputs, befores))
    return (inputs, befores), tf.cast(by_gates, tf.float32), tf.cast(by_inner, tf.float32)


def _dropped(layer: Any, call: Any, seen: Tensor, states: list[Tensor]) -> list[list[Any]]:
    """Gives the masks of dropout of a call for each gate, or one for all; None for none.

    They are drawn again, from the same seeds and keys of rows.
    """
    cell = layer.cell
    asked = bool(cell.dropout or cell.recurrent_dropout) and call.argument(3, "training")
    if not asked:
        return [[None], [None]]
    with keras.StatelessScope(state_mapping=call.seeds):
        try:
            of_inputs = cell.get_dropout_mask(seen[:, 0])
            of_states = cell.get_recurrent_dropout_mask(states[0])
        finally:
            cell.reset_dropout_mask()
            cell.reset_recurrent_dropout_mask()
    return [[m] if m is None or tf.is_tensor(m) else list(m) for m in (of_inputs, of_states)]


def _times(factors: list[Tensor], kernel: Tensor) -> Tensor:
    """Multiplies by a kernel, of which each gate's part may have a factor of its own."""
    # XLA takes no `tensordot` within a loop.
    times = tf.matmul if factors[0].shape.rank == 2 else partial(tf.tensordot, axes=1)
    split = zip(factors, tf.split(kernel, len(factors), 1), strict=True)
    each = [times(factor, part) for factor, part in split]
    return each[0] if len(each) == 1 else tf.concat(each, -1)


def _run(
    layer: Any,
    gates: Tensor,
    inner: Tensor,
    from_state: Callable[[Tensor], Tensor],
    states: list[Tensor],
    mask: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gives the outputs, h before each step, both batch by time, and the last states."""
    steps = gates.shape[0] if gates.shape[0] is not None else tf.shape(gates)[0]
    step = _STEPS[type(layer.cell)]

    def read(values: Tensor) -> Any:
        return tf.TensorArray(values.dtype, size=steps).unstack(values)

    of_gates, of_inner = read(gates), read(inner)
    kept = None if mask is None else read(tf.transpose(mask)[:, :, None])
    written = [tf.TensorArray(gates.dtype, size=steps) for _ in range(2)]

    def body(time: Tensor, output: Tensor, now: list[Tensor], arrays: list[Any]) -> Any:
        from_h = from_state(now[0]) + of_inner.read(time)
        after = step(layer.cell, of_gates.read(time), from_h, now)
        made = after[0]
        if kept is not None:
            here = kept.read(time)
            masked = tf.zeros_like(made) if layer.zero_output_for_mask else output
            made = tf.where(here, made, masked)
            after = [tf.where(here, new, old) for new, old in zip(after, now, strict=True)]
        arrays = [arrays[0].write(time, made), arrays[1].write(time, now[0])]
        return time + 1, made, after, arrays

    _, _, last, arrays = tf.while_loop(
        lambda time, *_: time < steps,
        body,
        (tf.constant(0), tf.zeros_like(states[0]), states, written),
        maximum_iterations=steps,
    )
    outputs, before = (tf.transpose(array.stack(), [1, 0, 2]) for array in arrays)
    return outputs, before, last


def _lstm(cell: Any, gates: Tensor, from_h: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, c, o = tf.split(gates + from_h, 4, 1)
    opens = cell.recurrent_activation
    carry = opens(f) * states[1] + opens(i) * cell.activation(c)
    return [opens(o) * cell.activation(carry), carry]


def _gru(cell: Any, gates: Tensor, from_h: Tensor, states: list[Tensor]) -> list[Tensor]:
    (z, r, h), (of_z, of_r, of_h) = (tf.split(part, 3, 1) for part in (gates, from_h))
    opens = cell.recurrent_activation
    update = opens(z + of_z)
    made = cell.activation(h + opens(r + of_r) * of_h)
    return [update * states[0] + (1 - update) * made]


def _simple(cell: Any, gates: Tensor, from_h: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [cell.activation(gates + from_h)]


_STEPS: dict[type, _Step] = {
    layers.LSTMCell: _lstm,
    layers.GRUCell: _gru,
    layers.SimpleRNNCell: _simple,
}


def _value(variable: Any, dtype: Any) -> Tensor:
    return tf.cast(tf.convert_to_tensor(variable), dtype)
