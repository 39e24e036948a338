"""Per-example gradients of recurrent layers, from their gates' inputs at each time step.

A gate's input is x_t W + h_(t-1) U + b, so the gradients by W, U and b are products of x_t,
h_(t-1) and 1 with the gradient by that input, summed over time. Keras does not show those
gradients, so the layer is computed once more, for all examples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from keras import layers

from tfdist.privacy.parts import Part, Product, Written

Tensor = Any
_CELLS = {
    layers.LSTM: layers.LSTMCell,
    layers.GRU: layers.GRUCell,
    layers.SimpleRNN: layers.SimpleRNNCell,
}
# What a step makes of the gates' inputs, the part from h alone, and the states.
_Step = Callable[[Any, Tensor, Tensor, list[Tensor]], list[Tensor]]


def has_form(layer: Any) -> bool:
    """Tells whether a recurrent layer is one that `of_recurrent` knows.

    Args:
        layer: A built `keras.layers.RNN`.
    """
    if type(layer.cell) is not _CELLS.get(type(layer)) or layer.stateful:
        return False
    cell = layer.cell
    return bool(
        not cell.dropout and not cell.recurrent_dropout and getattr(cell, "reset_after", True)
    )


def of_recurrent(layer: Any, calls: Sequence[Any]) -> list[Part]:
    """Gives the gradients by the weights of an LSTM, a GRU or a SimpleRNN.

    Args:
        layer: One with `has_form`.
        calls: Its calls, as `closed_forms.Call`s.
    """
    cell = layer.cell
    found = [_of_call(layer, call) for call in calls]
    seen, before, by_gates, by_inner = (tf.concat(each, 1) for each in zip(*found, strict=True))
    parts: list[Part] = [
        Product(cell.kernel, seen, by_gates),
        Product(cell.recurrent_kernel, before, by_inner),
    ]
    if cell.use_bias:
        sums = [tf.reduce_sum(by_gates, 1), tf.reduce_sum(by_inner, 1)]
        two = len(cell.bias.shape) == 2  # a GRU has one for each of both parts
        parts.append(Written(cell.bias, tf.stack(sums, 1) if two else sums[0]))
    return parts


def _of_call(layer: Any, call: Any) -> tuple[Tensor, ...]:
    """Gives inputs, states before each step, and the gradients by both parts of the gates."""
    cell = layer.cell
    dtype = tf.as_dtype(layer.compute_dtype)  # rounded as in the layer itself
    seen = tf.cast(call.inputs, dtype)
    mask = call.argument(2, "mask")
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    if layer.go_backwards:
        seen = tf.reverse(seen, [1])
        mask = None if mask is None else tf.reverse(mask, [1])
    kernel, recurrent = (_value(v, dtype) for v in (cell.kernel, cell.recurrent_kernel))
    gates = tf.transpose(tf.tensordot(seen, kernel, 1), [1, 0, 2])
    inner = tf.zeros_like(gates)
    if cell.use_bias:
        bias = _value(cell.bias, dtype)
        gates += bias[0] if len(bias.shape) == 2 else bias
        inner += bias[1] if len(bias.shape) == 2 else 0.0
    states = tf.nest.flatten(call.argument(1, "initial_state"))
    if not states or states[0] is None:
        states = layer.get_initial_state(tf.shape(seen)[0])
    states = [tf.cast(state, dtype) for state in tf.nest.flatten(states)]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([gates, inner])
        outputs, before, last = _run(layer, gates, inner, recurrent, states, mask)
        made = [outputs if layer.return_sequences else outputs[:, -1]]
        made += last if layer.return_state else []
    given = [tf.cast(g, dtype) for g in tf.nest.flatten(call.gradients)]
    by = tape.gradient(
        made, [gates, inner], given, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    by_gates, by_inner = (tf.transpose(tf.convert_to_tensor(g), [1, 0, 2]) for g in by)
    # What is summed over time is summed in float32.
    return tuple(tf.cast(t, tf.float32) for t in (seen, before, by_gates, by_inner))


def _run(
    layer: Any,
    gates: Tensor,
    inner: Tensor,
    recurrent: Tensor,
    states: list[Tensor],
    mask: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gives the outputs, h before each step, both batch by time, and the last states."""
    steps = gates.shape[0] if gates.shape[0] is not None else tf.shape(gates)[0]
    step = _STEPS[type(layer)]

    def read(values: Tensor) -> Any:
        return tf.TensorArray(values.dtype, size=steps).unstack(values)

    of_gates, of_inner = read(gates), read(inner)
    kept = None if mask is None else read(tf.transpose(mask)[:, :, None])
    written = [tf.TensorArray(gates.dtype, size=steps) for _ in range(2)]

    def body(time: Tensor, output: Tensor, now: list[Tensor], arrays: list[Any]) -> Any:
        from_h = tf.matmul(now[0], recurrent) + of_inner.read(time)
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


_STEPS: dict[type, _Step] = {layers.LSTM: _lstm, layers.GRU: _gru, layers.SimpleRNN: _simple}


def _value(variable: Any, dtype: Any) -> Tensor:
    return tf.cast(tf.convert_to_tensor(variable), dtype)
