"""What a model is made of, and making it before it is trained."""

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

from tfdist._keras.discovery import Step, run, trace


def build(model: Any, kind: str, spec: Any, sample: Callable[[], Any]) -> Step:
    """Creates every variable that a step will need, without making a step.

    Variables made while a replica's step is traced would belong to that replica. Keras builds
    a model from shapes alone where it can; a model with a step of its own, or with code that
    needs tensors, is built by a first trace of that step.

    Args:
        model: A `keras.Model`, compiled unless it predicts.
        kind: "train_step", "test_step" or "predict_step".
        spec: Describes a batch: `x`, `(x, y)` or `(x, y, sample_weight)`, leaves with shape and
            dtype.
        sample: Gives a batch, for a model that runs eagerly.

    Returns:
        What the step is made of besides the model, where it has one of its own.

    Raises:
        Exception: What the step raises, as in Keras's own first step.
    """
    # Code of somebody's own may keep seeds, optimizers, or a tf.Variable.
    optimizer = getattr(model, "optimizer", None)
    is_keras_s = not has_own_code(model) and (optimizer is None or _is_keras(type(optimizer)))
    if kind == "predict_step":
        is_built = not has_own(model, kind)
        if is_built:
            build_layers(model, spec)
    else:
        is_built = not has_own(model, kind) and build_from_shapes(model, spec)
    if is_built and is_keras_s:
        return Step()
    step = step_of(model, kind)
    if model.run_eagerly:
        return run(step, sample())
    return trace(step, tf.nest.map_structure(_type_spec, spec))


def build_from_shapes(model: Any, spec: Any) -> bool:
    """Builds a model, its optimizer and metrics from shapes alone, where that can be.

    What a step that is traced makes is nothing if the trace fails, and a second `fit` finds it.

    Args:
        model: A compiled `keras.Model`.
        spec: As in `build`.

    Returns:
        Whether it could be.
    """
    try:
        model._symbolic_build(data_batch=spec)
    except Exception:  # whatever the model's own code makes of shapes without values
        return False
    return True


def _type_spec(leaf: Any) -> Any:
    return leaf if isinstance(leaf, tf.TypeSpec) else tf.TensorSpec(leaf.shape, leaf.dtype)


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
        model: A `keras.Model`.

    Returns:
        The loss tracker, the optimizer and the steps per execution.
    """
    return (model._loss_tracker, getattr(model, "optimizer", None), model.steps_per_execution)


def is_compiled_as(model: Any, state: tuple[Any, ...]) -> bool:
    """Tells whether a model has not been compiled again.

    Args:
        model: A compiled `keras.Model`.
        state: What `compiled_state` gave.
    """
    now = compiled_state(model)
    return len(now) == len(state) and all(a is b for a, b in zip(now, state, strict=True))


def has_global_seed() -> bool:
    """Tells whether anything drew from Keras's own seed generator, or may have."""
    return _global_state.get_global_attribute("global_seed_generator") is not None


def is_seeded() -> bool:
    """Tells whether `keras.utils.set_random_seed` was called in this process."""
    return _rng_utils.get_random_seed() is not None


def global_seed_variable() -> Any:
    """Gives the state of the generator that draws where no seed was given.

    Returns:
        A `keras.Variable`; the generator is made if there is none.
    """
    return _global_seed_generator().state


def layers_of(model: Any) -> list[Any]:
    """Lists a model and all layers in it.

    Args:
        model: A `keras.Model`.
    """
    return list(model._flatten_layers())


def computes_coarsely(model: Any) -> bool:
    """Tells whether some of a model's products are rounded to half precision, or near it.

    Args:
        model: A `keras.Model`.
    """
    is_tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    if is_tf32 and tf.config.list_physical_devices("GPU"):
        return True
    halves = ("float16", "bfloat16")
    return any(layer.compute_dtype in halves for layer in layers_of(model))


def has_own_code(model: Any) -> bool:
    """Tells whether a model, or something in it, is of a class that is not Keras's.

    Args:
        model: A compiled `keras.Model`.
    """
    compiled = [getattr(model, "_compile_loss", None), getattr(model, "_compile_metrics", None)]
    asked = [getattr(part, "_user_loss", None) for part in compiled if part is not None]
    asked += [getattr(part, "_user_metrics", None) for part in compiled if part is not None]
    parts = [*layers_of(model), *model.metrics, *keras.tree.flatten(asked)]
    return any(
        not _is_keras(part if callable(part) and hasattr(part, "__module__") else type(part))
        for part in parts
        if part is not None and not isinstance(part, str)
    )


def _is_keras(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).partition(".")[0] == "keras"


def has_own(model: Any, kind: str) -> bool:
    """Tells whether a model's class overrides a step.

    Args:
        model: A `keras.Model`.
        kind: "train_step" or "test_step".
    """
    return getattr(type(model), kind) is not getattr(keras.Model, kind)


def step_of(model: Any, kind: str) -> Callable[[Any], Any]:
    """Gives a model's step, without the `tf.function` that its class may have put around it.

    A function of its own would be traced for one replica and then run on all of them.

    Args:
        model: A `keras.Model`.
        kind: "train_step", "test_step" or "predict_step".
    """
    step: Callable[[Any], Any] = getattr(model, kind)
    plain = getattr(inspect.getattr_static(type(model), kind), "python_function", None)
    if plain is None:
        return step
    with contextlib.suppress(Exception):  # as tf.function does: what has no source stays
        plain = tf.autograph.to_graph(plain)
    return types.MethodType(plain, model)
