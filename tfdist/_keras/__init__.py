"""The only file that touches what Keras and its TensorFlow trainer keep private.

Every touch says what it relies on; `tests/test_keras_contract.py` fails loudly when a
Keras release changes it.

Keras's own `train_step` is what tfdist runs, on every strategy. It was written for one
process, and the functions below replace, while several replicas train, the few places in
which it has to know that its batch is a share of a larger one:

========================  ==========================================================
place                     what changes
========================  ==========================================================
the loss's reduction      no division by the number of replicas; a masked or weighted
                          mean is over the global batch
the optimizer's update    the backend-neutral one: each replica updates its own copy
                          with the same, already reduced, gradient
BatchNormalization        moments over the global batch when `synchronized=True`
dropout, random seeds     a function of the example's place in the global batch; dropout also
                          where one process trains, the same compiled by XLA or not
Variable assignment       is noted, so that what the forward pass changed can be
                          brought to the same value everywhere
========================  ==========================================================
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.backend.tensorflow import random as _random
from keras.src.backend.tensorflow.core import Variable as _Variable
from keras.src.backend.tensorflow.optimizer import TFOptimizer as _TFOptimizer
from keras.src.losses import loss as _loss
from keras.src.optimizers.base_optimizer import BaseOptimizer as _BaseOptimizer
from keras.src.random.seed_generator import global_seed_generator as _global_seed_generator
from keras.src.trainers.data_adapters.data_adapter import DataAdapter as _DataAdapter
from keras.src.trainers.epoch_iterator import EpochIterator as _EpochIterator

Tensor = Any
"""A `tf.Tensor`, `tf.IndexedSlices` or what converts to one."""


class Updates(Protocol):
    """What stands between a replica's train step and its optimizers."""

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Changes the loss before its gradient is taken."""

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Takes a replica's gradients; sooner or later calls `update` with reduced ones."""


@dataclass
class ReplicaBatch:
    """What one replica knows, while a step is traced, about its share of a global batch.

    Attributes:
        rows: Scalar int64 tensor, the examples of this replica's share. At 0 the share
            holds one padding row, which must contribute nothing.
        total: Scalar int64 tensor, the examples of the global batch.
        offset: Scalar int64 tensor, the global batch's row at which the share begins.
        all_reduce: Sums a list of tensors over all replicas.
        updates: Receives what the train step does with optimizers, while it runs.
        watched: Ids of the `keras.Variable`s whose assignments are noted.
        touched: Watched variables assigned so far, with the value before, by their id.
    """

    rows: Tensor
    total: Tensor
    offset: Tensor
    all_reduce: Callable[[Sequence[Tensor]], list[Tensor]]
    updates: Updates | None = None
    watched: frozenset[int] = frozenset()
    touched: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def has_rows(self) -> Tensor:
        """Scalar bool tensor: whether the share holds examples."""
        return self.rows > 0

    @property
    def share(self) -> Tensor:
        """Scalar float32 tensor: the share's part of the global batch, from 0 to 1.

        It is 0 when the global batch is empty.
        """
        return tf.math.divide_no_nan(
            tf.cast(self.rows, tf.float32), tf.cast(self.total, tf.float32)
        )

    @property
    def inverse_share(self) -> Tensor:
        """Scalar float32 tensor: 1 / `share`, and 0 without examples."""
        return tf.math.divide_no_nan(
            tf.cast(self.total, tf.float32), tf.cast(self.rows, tf.float32)
        )


_current = threading.local()


def _replica_batch() -> ReplicaBatch | None:
    return getattr(_current, "batch", None)


@contextlib.contextmanager
def on_replica(batch: Any) -> Iterator[Any]:
    """Makes `batch` what Keras's functions see in this thread, within `replicated()`.

    Args:
        batch: The replica's share, a `ReplicaBatch`; None for what is no part of a larger
            batch. tf.distribute traces each replica in its own thread.

    Yields:
        `batch`.
    """
    before = _replica_batch()
    _current.batch = batch
    try:
        yield batch
    finally:
        _current.batch = before


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Puts something else in a place of a class or module, while the context lasts.

    Args:
        owner: The class or module, in whose own `__dict__` the place is.
        name: Of the place.
        value: What to put there.
    """
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def replicated(model: Any, has_servers: bool = False) -> Iterator[None]:
    """Replaces the places named at the top of this file while a model is trained.

    The replacements look up the calling thread's `on_replica` batch and do what Keras
    does when there is none.

    Args:
        model: The `keras.Model` whose optimizers are intercepted.
        has_servers: Whether `served` replaces the optimizer's update.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements(has_servers):
            stack.enter_context(replaced(owner, name, value))
        for optimizer in optimizers_of(model):
            stack.enter_context(_intercepted(optimizer))
        yield


def alone() -> contextlib.AbstractContextManager[None]:
    """Lets a model that is no replica drop what it would drop as one, also compiled by XLA."""
    return replaced(_random, "dropout", _dropout)


def _replacements(has_servers: bool = False) -> list[tuple[Any, str, Any]]:
    replacements: list[tuple[Any, str, Any]] = [
        # Called through the module by Keras's losses, trainer and CompileLoss.
        (_loss, "scale_loss_for_distribution", lambda value: value),
        (_loss, "unscale_loss_for_distribution", lambda value: value),
        (_loss, "reduce_weighted_values", _reduce_weighted_values),
        (keras.optimizers.LossScaleOptimizer, "_tf_apply", _apply_loss_scaled),
        (keras.layers.BatchNormalization, "_moments", _moments),
        (_Variable, "_direct_assign", _direct_assign),
        (_random, "dropout", _dropout),
        (_random, "draw_seed", _draw_seed),
    ]
    # TFOptimizer overrides these with tf.distribute's merge_call, which reduces a second
    # time and cannot run inside tf.cond (gradient accumulation, EMA, loss scaling).
    # The versions it overrides assign plainly, which is right on every replica because
    # all of them hold the same weights and the same reduced gradient.
    replacements += [
        (_TFOptimizer, name, _BaseOptimizer.__dict__[name])
        for name in (
            *(() if has_servers else ("_apply_weight_decay", "_backend_update_step")),
            "_backend_increment_gradient_accumulators",
            "_overwrite_model_variables_with_average_value",
        )
    ]
    return replacements


# --- losses ---------------------------------------------------------------------------

_keras_reduce_weighted_values = _loss.reduce_weighted_values


def _reduce_weighted_values(
    values: Tensor,
    sample_weight: Tensor = None,
    mask: Tensor = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
) -> Tensor:
    """Reduces a loss so that its mean over replicas, weighted by their rows, is exact.

    Later the result is multiplied by the replica's share and summed over replicas. For a
    mean over rows that is all; a sum, or a mean whose divisor is a number of unmasked
    elements or a sum of weights, is corrected here for what that will do to it.
    """
    local = _keras_reduce_weighted_values(
        values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
    )
    batch = _replica_batch()
    if batch is None:
        return local
    if reduction in ("sum", "none", None):
        return local * tf.cast(batch.inverse_share, local.dtype)
    if reduction == "mean_with_sample_weight" and (sample_weight, mask) != (None, None):
        divisor = _keras_reduce_weighted_values(
            tf.ones_like(values), sample_weight, mask, reduction="sum", dtype=dtype
        )
    elif mask is not None:
        divisor = tf.reduce_sum(tf.cast(mask, local.dtype))
    else:
        return local
    divisor = tf.where(batch.has_rows, tf.cast(divisor, tf.float32), 0.0)
    (total,) = batch.all_reduce([divisor])
    correction = tf.math.divide_no_nan(divisor, total) * batch.inverse_share
    return local * tf.cast(correction, local.dtype)


# --- optimizers -----------------------------------------------------------------------


def _apply_loss_scaled(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
    optimizer._common_apply(grads, trainable_variables)


def optimizers_of(model: Any) -> list[Any]:
    """Lists the optimizers a model holds: the compiled one and, in a GAN, its others.

    Args:
        model: A `keras.Model`.

    Returns:
        Distinct `keras.Optimizer` instances, the compiled one first.
    """
    held = [getattr(model, "optimizer", None), *vars(model).values()]
    unique = {id(o): o for o in held if isinstance(o, keras.optimizers.Optimizer)}
    return list(unique.values())


def trained_variables(optimizer: Any) -> list[Any]:
    """Lists the variables that an optimizer was built to train.

    Args:
        optimizer: A `keras.Optimizer`.
    """
    return list(optimizer._trainable_variables) if optimizer.built else []


@contextlib.contextmanager
def _intercepted(optimizer: Any) -> Iterator[None]:
    """Lets the calling thread's replica stand between a train step and an optimizer."""
    scale_loss, apply = optimizer.scale_loss, optimizer.apply

    def intercepted_scale_loss(loss: Tensor) -> Tensor:
        batch = _replica_batch()
        if batch is None or batch.updates is None:
            return scale_loss(loss)
        return scale_loss(batch.updates.scale(optimizer, loss))

    def intercepted_apply(grads: Sequence[Tensor], trainable_variables: Any = None) -> None:
        batch = _replica_batch()
        if batch is None or batch.updates is None:
            apply(grads, trainable_variables)
        else:
            variables = trainable_variables or optimizer._trainable_variables
            batch.updates.apply(
                optimizer,
                list(grads),
                lambda reduced: apply(reduced, trainable_variables),
                list(variables),
            )

    # Set on the instance: subclasses override these methods.
    vars(optimizer).update(scale_loss=intercepted_scale_loss, apply=intercepted_apply)
    try:
        yield
    finally:
        del vars(optimizer)["scale_loss"], vars(optimizer)["apply"]


# --- BatchNormalization ---------------------------------------------------------------

_keras_moments = keras.layers.BatchNormalization._moments


def _moments(layer: Any, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gives moments over the global batch, one collective, no row counted that is padding.

    Sums are taken of x - moving_mean, which is the same on every replica: E[x^2] - E[x]^2
    then does not cancel once the moving mean has come near the mean.
    """
    batch = _replica_batch()
    if batch is None or not layer.synchronized:
        return _keras_moments(layer, inputs, mask)  # type: ignore[no-any-return]
    axes = layer._reduction_axes
    shape = [1] * len(inputs.shape)
    shape[layer.axis] = inputs.shape[layer.axis]
    shift = tf.stop_gradient(tf.reshape(tf.cast(layer.moving_mean, inputs.dtype), shape))
    counted = tf.ones_like(inputs)
    if mask is not None:
        counted *= tf.cast(tf.expand_dims(mask, -1), inputs.dtype)
    counted *= tf.cast(batch.has_rows, inputs.dtype)
    shifted = tf.where(counted > 0, inputs - shift, 0.0)
    sums = tf.stack(
        [
            tf.reduce_sum(shifted, axes),
            tf.reduce_sum(tf.square(shifted), axes),
            tf.reduce_sum(counted, axes),
        ]
    )
    (reduced,) = batch.all_reduce([sums])
    first, second, count = tf.unstack(reduced)
    if mask is not None:
        count += keras.config.epsilon()  # as Keras does in its masked moments
    first, second = (
        tf.math.divide_no_nan(first, count),
        tf.math.divide_no_nan(second, count),
    )
    variance = tf.maximum(second - tf.square(first), 0.0)
    # Without a row the moving statistics must stay what they are.
    moving = tf.cast(layer.moving_variance, variance.dtype)
    variance = tf.where(batch.total > 0, variance, moving)
    return first + tf.reshape(shift, [-1]), variance


def synchronized_variables(model: Any) -> set[int]:
    """Collects the ids of variables which replicas change to the same value by themselves.

    Args:
        model: A `keras.Model`.

    Returns:
        Ids of the moving statistics of BatchNormalization layers with
        `synchronized=True`.
    """
    return {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized
        for variable in layer.non_trainable_variables
    }


# --- variables ------------------------------------------------------------------------

_keras_direct_assign = _Variable._direct_assign


def _direct_assign(variable: Any, value: Tensor) -> None:
    batch = _replica_batch()
    key = id(variable)
    if batch is not None and key in batch.watched and key not in batch.touched:
        batch.touched[key] = (variable, tf.identity(variable._value))
    _keras_direct_assign(variable, value)


def swap_value(variable: Any, value: Any) -> Any:
    """Gives a `keras.Variable` another `tf.Variable` to live in.

    Args:
        variable: The `keras.Variable`.
        value: A `tf.Variable` of its shape and dtype.

    Returns:
        The `tf.Variable` it lived in before.
    """
    before = variable._value
    variable._value = value
    return before


def reindex_optimizer(optimizer: Any) -> None:
    """Lets an optimizer find its variables after `swap_value`.

    Keras indexes them by the id of the underlying `tf.Variable`, at build time.

    Args:
        optimizer: A built `keras.Optimizer`.
    """
    for part in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if part is not None and part.built:
            part._trainable_variables_indices = {
                part._var_key(variable): index
                for index, variable in enumerate(part._trainable_variables)
            }
            # The cache of which variables decay is keyed in the same way.
            if hasattr(part, "_exclude_from_weight_decay_cache"):
                part._exclude_from_weight_decay_cache = {}


# --- random numbers -------------------------------------------------------------------

_keras_dropout = _random.dropout
_keras_draw_seed = _random.draw_seed
_PHILOX = tf.random.Algorithm.PHILOX.value
# So many of a number's bits make a float from 0 to 1.
_FRACTION_BITS = {tf.float16: 10, tf.bfloat16: 7, tf.float32: 23, tf.float64: 52}


def _draw_seed(seed: Any) -> Tensor:
    """Draws a seed that differs between replicas, so that their noise is independent."""
    drawn = _keras_draw_seed(seed)
    batch = _replica_batch()
    if batch is None:
        return drawn
    offset = tf.cast(batch.offset, drawn.dtype)
    return drawn + tf.stack([tf.zeros_like(offset), offset * 7919])


def _dropout(inputs: Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> Tensor:
    """Drops what one process would drop: noise for the global batch, the share's rows of it.

    The generator is counter-based, so the rows before the share cost nothing.
    """
    if rate in (0.0, 1.0):
        return _keras_dropout(inputs, rate, noise_shape, seed)
    batch = _replica_batch()
    draw_seed = _random.draw_seed if batch is None else _keras_draw_seed
    drawn = _random._cast_seed(draw_seed(seed))
    shape = _random._get_concrete_noise_shape(inputs, noise_shape)
    shape = tf.cast(tf.shape(inputs) if shape is None else shape, tf.int64)
    first = tf.constant(0, tf.int64)
    if batch is not None:
        local = tf.cast(tf.shape(inputs)[0], tf.int64)
        # A layer may have folded other axes into the first: so many positions an example has.
        repeats = local // tf.maximum(batch.rows, 1)
        first = tf.where(shape[0] == local, batch.offset * repeats, first)
    is_kept = _is_at_least(rate, shape, first, drawn, tf.as_dtype(inputs.dtype))
    scaled = inputs * tf.constant(1.0 / (1.0 - rate), inputs.dtype)
    return tf.where(is_kept, scaled, tf.zeros_like(scaled))


def _is_at_least(
    rate: float, shape: Tensor, first: Tensor, seed: Tensor, dtype: tf.DType
) -> Tensor:
    """Tells where what `_uniform_rows` gives is `rate` or more, compiled by XLA or not.

    Of the same bits XLA makes other floats than TensorFlow's kernels do, so that one process
    on a GPU, which Keras compiles, would drop other numbers: what is compared are the bits.
    """
    bits = _FRACTION_BITS[dtype]
    whole = tf.uint64 if dtype == tf.float64 else tf.uint32
    drawn = _uniform_rows(shape, first, seed, whole, tf.raw_ops.StatelessRandomUniformFullIntV2)
    if dtype == tf.float64:  # TensorFlow's kernel takes the first half for the upper one
        half = tf.constant(32, whole)
        drawn = tf.bitwise.left_shift(drawn, half) | tf.bitwise.right_shift(drawn, half)
    fraction = tf.bitwise.bitwise_and(drawn, tf.constant(2**bits - 1, whole))
    least = math.ceil(float(np.asarray(rate, dtype.as_numpy_dtype)) * 2**bits)
    return fraction >= tf.constant(least, whole)


def _uniform_rows(
    shape: Tensor,
    first: Tensor,
    seed: Tensor,
    dtype: Any,
    draw: Callable[..., Tensor] = tf.raw_ops.StatelessRandomUniformV2,
) -> Tensor:
    """Computes rows [first, first + shape[0]) of `tf.random.stateless_uniform`.

    Philox turns each value of its counter into 128 bits (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011), which TensorFlow makes 4 floats or 2 doubles.
    `draw` may be another op that makes as many of them, such as StatelessRandomNormalV2.
    """
    per_count = 2 if tf.as_dtype(dtype).size == 8 else 4
    elements, start = tf.reduce_prod(shape), first * tf.reduce_prod(shape[1:])
    skipped = start % per_count
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    counter += tf.stack([tf.cast(start // per_count, tf.uint64), tf.constant(0, tf.uint64)])
    numbers = draw(
        shape=[elements + per_count - 1], key=key, counter=counter, alg=_PHILOX, dtype=dtype
    )
    return tf.reshape(tf.slice(numbers, [skipped], [elements]), shape)


# --- the loop -------------------------------------------------------------------------


class StreamAdapter(_DataAdapter):  # type: ignore[misc]
    """Hands a tfdist stream to Keras's loop, which takes a `DataAdapter` as it is.

    Args:
        stream: Iterable, one iteration an epoch.
        num_batches: Steps an epoch, or None when unknown.
        on_epoch_end: Called by Keras when an epoch of data ends.
    """

    def __init__(
        self,
        stream: Any,
        num_batches: int | None,
        on_epoch_end: Callable[[], None] | None = None,
    ) -> None:
        self._stream = stream
        self._num_batches = num_batches
        self._on_epoch_end = on_epoch_end

    def get_tf_dataset(self) -> Any:
        """Returns the stream: the default strategy's `distribute_dataset` leaves it be."""
        return self._stream

    @property
    def num_batches(self) -> int | None:
        """Steps an epoch, or None when unknown."""
        return self._num_batches

    @property
    def batch_size(self) -> int | None:
        """Unknown: shares differ in size."""
        return None

    @property
    def has_partial_batch(self) -> bool | None:
        """Unknown."""
        return None

    @property
    def partial_batch_size(self) -> int | None:
        """Unknown."""
        return None

    def on_epoch_begin(self) -> None:
        """Nothing to do: a stream starts its epoch when its first element is drawn."""

    def on_epoch_end(self) -> None:
        """Tells the source that its epoch is over."""
        if self._on_epoch_end is not None:
            self._on_epoch_end()


# As Keras defines them, whatever `tfdist.drop_in()` puts in their place.
FIT = keras.Model.fit
EVALUATE = keras.Model.evaluate
PREDICT = keras.Model.predict


@contextlib.contextmanager
def loop_functions(
    model: Any, kinds: tuple[type, ...], **functions: Callable[..., Any]
) -> Iterator[None]:
    """Makes Keras's loop call other functions than it would build for itself.

    `make_train_function` and its siblings return early when the attribute is set. What a
    callback evaluates or predicts meanwhile on data of its own, Keras's functions do.

    Args:
        model: A `keras.Model`.
        kinds: The classes of what a `StreamAdapter`'s stream gives.
        **functions: `train_function`, `test_function`, `predict_function`, for those.
    """
    before = {name: getattr(model, name) for name in functions}
    own: dict[str, Callable[..., Any]] = {}
    results = model._get_metrics_result_or_logs
    has_made_steps = False

    def results_of_steps(logs: Any) -> Any:
        """Gives no zeros as the results of an epoch without a step, as Keras does."""
        nonlocal has_made_steps
        made, has_made_steps = has_made_steps, False
        found = results(logs)
        return found if made else dict.fromkeys(found, math.nan)

    def dispatching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(data: Any) -> Any:
            nonlocal has_made_steps
            first = data[0] if isinstance(data, list) else data
            if isinstance(first, kinds):
                made = function(data)
            else:
                if name not in own:
                    setattr(model, name, None)
                    getattr(model, f"make_{name}")()
                    own[name] = getattr(model, name)
                    setattr(model, name, dispatch)
                made = own[name](data)
            has_made_steps = True
            return made

        return dispatch

    for name, function in functions.items():
        setattr(model, name, dispatching(name, function))
    vars(model)["_get_metrics_result_or_logs"] = results_of_steps
    try:
        yield
    finally:
        del vars(model)["_get_metrics_result_or_logs"]
        for name, function in before.items():
            setattr(model, name, function)


@contextlib.contextmanager
def end_of_data_unless(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Keeps Keras's loop from calling a stop an input that ran out.

    Args:
        is_stopped: Tells whether a `StopIteration` was a stop.
    """
    warn = _EpochIterator._interrupted_warning

    def interrupted_warning(iterator: Any) -> None:
        if not is_stopped():
            warn(iterator)

    with replaced(_EpochIterator, "_interrupted_warning", interrupted_warning):
        yield


def build(model: Any, batch: Any) -> None:
    """Creates every variable that training will need, without running the model.

    Variables made while a step is traced would belong to that trace.

    Args:
        model: A compiled `keras.Model`.
        batch: What describes a batch: `x`, `(x, y)` or `(x, y, sample_weight)`, leaves with
            shape and dtype.
    """
    model._symbolic_build(data_batch=batch)


def build_layers(model: Any, batch: Any) -> None:
    """Creates a model's own variables, which is all that `predict` needs.

    Args:
        model: A `keras.Model`, compiled or not.
        batch: As in `build`.
    """
    if all(layer.built for layer in model._flatten_layers()):
        return
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    symbols = tf.nest.map_structure(
        lambda leaf: keras.KerasTensor(leaf.shape, _backend.standardize_dtype(leaf.dtype)), x
    )
    _backend.compute_output_spec(model, symbols, training=False)


def compiled_state(model: Any) -> tuple[Any, ...]:
    """Gives objects whose identity changes whenever the model is compiled again.

    Args:
        model: A compiled `keras.Model`.

    Returns:
        The loss tracker, the optimizer and the steps per execution.
    """
    return (model._loss_tracker, getattr(model, "optimizer", None), model.steps_per_execution)


def metric_variables(model: Any) -> list[Any]:
    """Lists the variables of the model's metrics, each once.

    Args:
        model: A compiled, built `keras.Model`.

    Returns:
        `keras.Variable`s.
    """
    unique = {id(v): v for metric in model.metrics for v in metric.variables}
    return list(unique.values())


def has_global_seed() -> bool:
    """Tells whether anything drew from Keras's own seed generator, or may have."""
    return _global_state.get_global_attribute("global_seed_generator") is not None


def global_seed_variable() -> Any:
    """Gives the state of the generator that draws where no seed was given.

    Returns:
        A `keras.Variable`; the generator is made if there is none.
    """
    return _global_seed_generator().state


def batch_metric_variables(model: Any) -> set[int]:
    """Collects the ids of metric variables in which every batch counts as one.

    With several losses Keras tracks each by a mean over batches, not over examples
    (CompileLoss passes the static batch size as weight, which is unknown here): of a
    replica's share only its part counts.

    Args:
        model: A compiled, built `keras.Model`.
    """
    if model._compile_loss is None:
        return set()
    return {id(v) for metric in model._compile_loss.metrics for v in metric.variables}


def has_own_train_step(model: Any) -> bool:
    """Tells whether the model's class overrides `train_step`.

    Args:
        model: A `keras.Model`.
    """
    return bool(type(model).train_step is not keras.Model.train_step)
