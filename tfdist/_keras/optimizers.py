"""Makes optimizers update with gradients that are reduced over replicas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer as _TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer as _BaseOptimizer

from tfdist._keras.attached import attached
from tfdist._keras.interception import Method, Replacement, in_family
from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.variables import first_backing


def replacements(has_servers: bool) -> list[Replacement]:
    """Lists the replacements for optimizers while several replicas train.

    Args:
        has_servers: Whether `served` replaces the update itself.
    """
    # TFOptimizer overrides these methods with tf.distribute's merge_call, which reduces a
    # second time and cannot run inside tf.cond (gradient accumulation, EMA, loss scaling).
    # The overridden versions assign plainly. That is right on every replica, because all
    # replicas have the same weights and the same reduced gradient.
    plain_methods = [
        *(() if has_servers else ("_apply_weight_decay", "_backend_update_step")),
        "_backend_increment_gradient_accumulators",
        "_overwrite_model_variables_with_average_value",
    ]
    return [
        *in_family(_BaseOptimizer, "apply", _intercepted_apply),
        *_custom_apply_gradients(),
        *in_family(_BaseOptimizer, "scale_loss", _intercepted_scale_loss),
        (keras.optimizers.LossScaleOptimizer, "_tf_apply", _apply_loss_scaled),
        *((_TFOptimizer, name, vars(_BaseOptimizer)[name]) for name in plain_methods),
        *in_family(_BaseOptimizer, "_use_weight_decay", _known_by_first_backing),
    ]


def _known_by_first_backing(original: Method) -> Method:
    """Lets `exclude_from_weight_decay` choose the variables that it chooses in plain Keras.

    TFOptimizer matches `var_names` with the name of the `tf.Variable`, which has that of the
    layer; the plain method has the `keras.Variable`. `var_list` is kept as keys of the
    `tf.Variable`s that were there when it was given.
    """

    @functools.wraps(original)
    def use_weight_decay(optimizer: Any, variable: Any) -> bool:
        if not isinstance(variable, keras.Variable):
            return bool(original(optimizer, variable))
        excluded = getattr(optimizer, "_exclude_from_weight_decay", ())
        if excluded and optimizer._var_key(variable) in excluded:
            return False
        return bool(original(optimizer, first_backing(variable)))

    return use_weight_decay


def _apply_loss_scaled(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
    optimizer._common_apply(grads, trainable_variables)


def _intercepted_apply(original: Method) -> Method:
    """Passes gradients to the replica of the calling thread, which reduces them first."""

    @functools.wraps(original)
    def apply(optimizer: Any, grads: Sequence[Tensor], trainable_variables: Any = None) -> Any:
        batch = current_batch()
        # `is_updating`: an optimizer's `apply` may call that of its base class, or of the
        # optimizer that it wraps.
        if batch is None or batch.updates is None or batch.is_updating:
            return original(optimizer, grads, trainable_variables)

        def update(reduced: list[Tensor]) -> None:
            with batch.updating():
                original(optimizer, reduced, trainable_variables)

        variables = list(trainable_variables or optimizer._trainable_variables)
        batch.updates.apply(optimizer, list(grads), update, variables)
        return None

    return apply


def _custom_apply_gradients() -> list[Replacement]:
    """Lists replacements for custom subclasses, which may process gradients first."""
    family = in_family(_BaseOptimizer, "apply_gradients", _intercepted_apply_gradients)
    return [
        replacement
        for replacement in family
        if not replacement[0].__module__.startswith("keras.")
    ]


def _intercepted_apply_gradients(original: Method) -> Method:
    @functools.wraps(original)
    def apply_gradients(optimizer: Any, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        batch = current_batch()
        if batch is None or batch.updates is None or batch.is_updating:
            return original(optimizer, grads_and_vars, *args, **kwargs)
        grads, variables = zip(*grads_and_vars, strict=True)

        def update(reduced: list[Tensor]) -> None:
            with batch.updating():
                pairs = list(zip(reduced, variables, strict=True))
                original(optimizer, pairs, *args, **kwargs)

        batch.updates.apply(optimizer, list(grads), update, list(variables))
        return optimizer.iterations

    return apply_gradients


def _intercepted_scale_loss(original: Method) -> Method:
    @functools.wraps(original)
    def scale_loss(optimizer: Any, loss: Tensor) -> Tensor:
        batch = current_batch()
        if batch is None or batch.updates is None or batch.is_updating:
            return original(optimizer, loss)
        loss = batch.updates.scale(optimizer, loss)
        with batch.updating():
            return original(optimizer, loss)

    return scale_loss


def watch_updates(on_update: Callable[[], None]) -> None:
    """Watches, from now on, for updates outside of a replica's step.

    Args:
        on_update: Called before each such update that runs or is traced.
    """

    def watched(original: Method) -> Method:
        @functools.wraps(original)
        def apply(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Inside of `run` of a tf.distribute strategy, TensorFlow reduces the gradients.
            if current_batch() is None and not tf.distribute.has_strategy():
                on_update()
            return original(optimizer, *args, **kwargs)

        return apply

    _BaseOptimizer.apply = watched(_BaseOptimizer.apply)


def optimizers_of(model: Any) -> list[Any]:
    """Lists the optimizers of a model: the compiled one and others, such as those of a GAN.

    Args:
        model: A `keras.Model`.

    Returns:
        Distinct `keras.Optimizer` instances, the compiled one first.
    """
    clip_optimizer = attached(model).clip_optimizer
    values = [getattr(model, "optimizer", None), *vars(model).values(), clip_optimizer]
    return with_nested([o for o in values if isinstance(o, keras.optimizers.Optimizer)])


def with_nested(optimizers: Sequence[Any]) -> list[Any]:
    """Adds the optimizers that optimizers wrap. Each occurs once.

    Args:
        optimizers: `keras.Optimizer`s.
    """
    nested: dict[int, Any] = {}
    stack = list(reversed(optimizers))
    while stack:
        optimizer = stack.pop()
        if id(optimizer) not in nested:
            nested[id(optimizer)] = optimizer
            attributes = keras.tree.flatten(list(vars(optimizer).values()))
            stack += [o for o in attributes if isinstance(o, keras.optimizers.Optimizer)]
    return list(nested.values())


def swap_strategy(optimizer: Any, strategy: Any) -> Any:
    """Sets the strategy through which an optimizer assigns its variables.

    Args:
        optimizer: A `keras.Optimizer`.
        strategy: A `tf.distribute.Strategy`.

    Returns:
        The former strategy.
    """
    before = optimizer._distribution_strategy
    optimizer._distribution_strategy = strategy
    return before


def trained_variables(optimizer: Any) -> list[Any]:
    """Lists the variables that an optimizer was built to train.

    Args:
        optimizer: A `keras.Optimizer`.
    """
    return list(optimizer._trainable_variables) if optimizer.built else []


def reindex_optimizer(optimizer: Any) -> None:
    """Updates an optimizer's index of variables after `swap_value`.

    Keras builds the index by the ids of the backing `tf.Variable`s, when it builds the
    optimizer.

    Args:
        optimizer: A built `keras.Optimizer`.
    """
    for part in with_nested([optimizer]):
        if part.built:
            part._trainable_variables_indices = {
                part._var_key(variable): index
                for index, variable in enumerate(part._trainable_variables)
            }
            if hasattr(part, "_var_to_optimizer_idx"):  # of a MultiOptimizer, in their order
                numbers = part._var_to_optimizer_idx.values()
                keys = map(part._var_key, part._trainable_variables)
                part._var_to_optimizer_idx = dict(zip(keys, numbers, strict=True))
            # The cache of the variables without weight decay has the same keys.
            if hasattr(part, "_exclude_from_weight_decay_cache"):
                part._exclude_from_weight_decay_cache = {}
