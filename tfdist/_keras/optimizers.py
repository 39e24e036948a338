"""Optimizers, which update with what was reduced over replicas."""

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


def replacements(has_servers: bool) -> list[Replacement]:
    """Lists what of optimizers changes while several replicas train.

    Args:
        has_servers: Whether `served` replaces the update itself.
    """
    # TFOptimizer overrides these with tf.distribute's merge_call, which reduces a second
    # time and cannot run inside tf.cond (gradient accumulation, EMA, loss scaling).
    # The versions it overrides assign plainly, which is right on every replica because
    # all of them hold the same weights and the same reduced gradient.
    plain = [
        *(() if has_servers else ("_apply_weight_decay", "_backend_update_step")),
        "_backend_increment_gradient_accumulators",
        "_overwrite_model_variables_with_average_value",
    ]
    return [
        *in_family(_BaseOptimizer, "apply", _intercepted_apply),
        *_own_apply_gradients(),
        *in_family(_BaseOptimizer, "scale_loss", _intercepted_scale_loss),
        (keras.optimizers.LossScaleOptimizer, "_tf_apply", _apply_loss_scaled),
        *((_TFOptimizer, name, vars(_BaseOptimizer)[name]) for name in plain),
    ]


def _apply_loss_scaled(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
    optimizer._common_apply(grads, trainable_variables)


def _intercepted_apply(original: Method) -> Method:
    """Lets the calling thread's replica stand between a train step and an optimizer."""

    @functools.wraps(original)
    def apply(optimizer: Any, grads: Sequence[Tensor], trainable_variables: Any = None) -> Any:
        batch = current_batch()
        # An optimizer's own `apply` calls that of its base, or of one that it wraps.
        if batch is None or batch.updates is None or batch.is_updating:
            return original(optimizer, grads, trainable_variables)

        def update(reduced: list[Tensor]) -> None:
            with batch.updating():
                original(optimizer, reduced, trainable_variables)

        variables = list(trainable_variables or optimizer._trainable_variables)
        batch.updates.apply(optimizer, list(grads), update, variables)
        return None

    return apply


def _own_apply_gradients() -> list[Replacement]:
    """Lists what subclasses do to gradients before they apply them."""
    family = in_family(_BaseOptimizer, "apply_gradients", _intercepted_apply_gradients)
    return [found for found in family if not found[0].__module__.startswith("keras.")]


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
    """Lets something be told, from now on, of updates where no replica's step runs.

    Args:
        on_update: Called before each such update that runs or is traced.
    """

    def told(original: Method) -> Method:
        @functools.wraps(original)
        def apply(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # In a strategy's own `run`, TensorFlow reduces.
            if current_batch() is None and not tf.distribute.has_strategy():
                on_update()
            return original(optimizer, *args, **kwargs)

        return apply

    _BaseOptimizer.apply = told(_BaseOptimizer.apply)


def optimizers_of(model: Any) -> list[Any]:
    """Lists the optimizers a model holds: the compiled one and, in a GAN, its others.

    Args:
        model: A `keras.Model`.

    Returns:
        Distinct `keras.Optimizer` instances, the compiled one first.
    """
    of_tfdist = attached(model).clip_optimizer
    held = [getattr(model, "optimizer", None), *vars(model).values(), of_tfdist]
    return with_nested([o for o in held if isinstance(o, keras.optimizers.Optimizer)])


def with_nested(optimizers: Sequence[Any]) -> list[Any]:
    """Adds the optimizers that optimizers wrap; each comes once.

    Args:
        optimizers: `keras.Optimizer`s.
    """
    found: dict[int, Any] = {}
    waiting = list(reversed(optimizers))
    while waiting:
        optimizer = waiting.pop()
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            held = keras.tree.flatten(list(vars(optimizer).values()))
            waiting += [o for o in held if isinstance(o, keras.optimizers.Optimizer)]
    return list(found.values())


def swap_strategy(optimizer: Any, strategy: Any) -> Any:
    """Gives an optimizer another strategy through which its variables are assigned.

    Args:
        optimizer: A `keras.Optimizer`.
        strategy: A `tf.distribute.Strategy`.

    Returns:
        The one it had.
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
    """Lets an optimizer find its variables after `swap_value`.

    Keras indexes them by the id of the underlying `tf.Variable`, at build time.

    Args:
        optimizer: A built `keras.Optimizer`.
    """
    for part in with_nested([optimizer]):
        if part.built:
            part._trainable_variables_indices = {
                part._var_key(variable): index
                for index, variable in enumerate(part._trainable_variables)
            }
            # The cache of which variables decay is keyed in the same way.
            if hasattr(part, "_exclude_from_weight_decay_cache"):
                part._exclude_from_weight_decay_cache = {}
