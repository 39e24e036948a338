"""Builds a model before it is trained, and lists its parts."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.random.seed_generator import global_seed_generator as _global_seed_generator
from keras.src.utils import rng_utils as _rng_utils

from tfdist._keras.discovery import StepTrace, run, trace
from tfdist._keras.recomputation import recomputed_calls


def build(model: Any, kind: str, spec: Any, sample: Callable[[], Any]) -> StepTrace:
    """Creates every variable that a step needs, without running a step.

    A variable that is made while a replica's step is traced would belong to that replica.
    Keras can build most models from shapes. If a model has a custom step, or code that needs
    tensors, a first trace of the step builds it.

    Args:
        model: A `keras.Model`, compiled unless `kind` is "predict_step".
        kind: "train_step", "test_step" or "predict_step".
        spec: Describes a batch: `x`, `(x, y)` or `(x, y, sample_weight)`, whose leaves have
            a shape and a dtype.
        sample: Returns a batch, for a model that runs eagerly.

    Returns:
        What the trace has found, if one was needed.

    Raises:
        Exception: Any error of the step, as in Keras's own first step.
    """
    # Custom code may hold seeds, optimizers or a tf.Variable, which only a trace shows.
    optimizer = getattr(model, "optimizer", None)
    is_all_keras = not has_own_code(model) and (optimizer is None or _is_keras(type(optimizer)))
    if kind == "predict_step":
        is_built = not has_own(model, kind)
        if is_built:
            build_layers(model, spec)
    else:
        is_built = not has_own(model, kind) and build_from_shapes(model, spec)
    if is_built and is_all_keras:
        return StepTrace()
    step = step_of(model, kind)
    if model.run_eagerly:
        return run(step, sample())
    return trace(step, tf.nest.map_structure(_type_spec, spec))


def build_from_shapes(model: Any, spec: Any) -> bool:
    """Builds a model, its optimizer and metrics from shapes, if possible.

    Without it, a failed trace of the first step could leave variables behind that are unusable
    in a second `fit`.

    Args:
        model: A compiled `keras.Model`.
        spec: As in `build`.

    Returns:
        Whether it was possible.

    Raises:
        tf.errors.ResourceExhaustedError: Weights or the optimizer's state need more memory
            than there is. A variable that is missing would be another error later.
    """
    try:
        model._symbolic_build(data_batch=spec)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception:  # custom code may fail on shapes without values in any way
        return False
    return True


def _type_spec(leaf: Any) -> Any:
    return leaf if isinstance(leaf, tf.TypeSpec) else tf.TensorSpec(leaf.shape, leaf.dtype)


def build_layers(model: Any, batch: Any) -> None:
    """Creates the variables of a model's layers, which is all that `predict` needs.

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
    """Returns objects that change when the model is compiled again or recomputes other layers.

    Args:
        model: A `keras.Model`.

    Returns:
        The loss tracker, the optimizer, the steps per execution, and what `recompute` has set.
    """
    optimizer = getattr(model, "optimizer", None)
    compiled = (model._loss_tracker, optimizer, model.steps_per_execution)
    return (*compiled, *recomputed_calls(model))


def is_compiled_as(model: Any, state: tuple[Any, ...]) -> bool:
    """Returns whether a model has not been compiled again.

    Args:
        model: A compiled `keras.Model`.
        state: An earlier result of `compiled_state`.
    """
    current = compiled_state(model)
    return len(current) == len(state) and all(
        a is b for a, b in zip(current, state, strict=True)
    )


def has_global_seed() -> bool:
    """Returns whether Keras's global seed generator exists, so that its state matters."""
    return _global_state.get_global_attribute("global_seed_generator") is not None


def is_seeded() -> bool:
    """Returns whether `keras.utils.set_random_seed` was called in this process."""
    return _rng_utils.get_random_seed() is not None


def global_seed_variable() -> Any:
    """Returns the state of the generator that Keras uses where no seed is passed.

    Returns:
        A `keras.Variable`. The generator is created if there is none.
    """
    return _global_seed_generator().state


def layers_of(model: Any) -> list[Any]:
    """Lists a model and all layers in it.

    Args:
        model: A `keras.Model`.
    """
    return list(model._flatten_layers())


def computes_coarsely(model: Any) -> bool:
    """Returns whether some products are rounded to half precision or TensorFloat-32.

    Args:
        model: A `keras.Model`.
    """
    is_tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    if is_tf32 and tf.config.list_physical_devices("GPU"):
        return True
    return computes_in(model, "float16", "bfloat16")


def computes_in(model: Any, *dtypes: str) -> bool:
    """Returns whether a layer of a model computes in one of some types.

    Args:
        model: A `keras.Model`.
        *dtypes: Names of types, such as "bfloat16".
    """
    return any(layer.compute_dtype in dtypes for layer in layers_of(model))


def has_own_code(model: Any) -> bool:
    """Returns whether a model, or a part of it, is of a class that is not Keras's.

    Args:
        model: A compiled `keras.Model`.
    """
    compiled = [getattr(model, "_compile_loss", None), getattr(model, "_compile_metrics", None)]
    user_parts = [getattr(part, "_user_loss", None) for part in compiled if part is not None]
    user_parts += [
        getattr(part, "_user_metrics", None) for part in compiled if part is not None
    ]
    parts = [*layers_of(model), *model.metrics, *keras.tree.flatten(user_parts)]
    return any(
        # A function has a module of its own, an object has that of its class.
        not _is_keras(part if callable(part) and hasattr(part, "__module__") else type(part))
        for part in parts
        if part is not None and not isinstance(part, str)
    )


def _is_keras(part: Any) -> bool:
    module = getattr(part, "__module__", None) or type(part).__module__
    return str(module).partition(".")[0] == "keras"


def has_own(model: Any, kind: str) -> bool:
    """Returns whether a model's class, or the model itself, overrides a step.

    Args:
        model: A `keras.Model`.
        kind: "train_step" or "test_step".
    """
    is_of_class = getattr(type(model), kind) is not getattr(keras.Model, kind)
    return is_of_class or kind in vars(model)


def step_of(model: Any, kind: str) -> Callable[[Any], Any]:
    """Returns a model's step, without a `tf.function` that its class may have added.

    A `tf.function` would be traced for one replica, and all replicas would run that trace.

    Args:
        model: A `keras.Model`.
        kind: "train_step", "test_step" or "predict_step".
    """
    step: Callable[[Any], Any] = getattr(model, kind)
    plain = getattr(inspect.getattr_static(type(model), kind), "python_function", None)
    if plain is None:
        return step
    with contextlib.suppress(Exception):  # as tf.function does for code without source
        plain = tf.autograph.to_graph(plain)
    # The plain function is one of the class, so it is bound here.
    return types.MethodType(plain, model)
