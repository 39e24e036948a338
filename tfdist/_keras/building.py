"""What a model is made of, and making it before it is trained."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.random.seed_generator import global_seed_generator as _global_seed_generator


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


def has_global_seed() -> bool:
    """Tells whether anything drew from Keras's own seed generator, or may have."""
    return _global_state.get_global_attribute("global_seed_generator") is not None


def global_seed_variable() -> Any:
    """Gives the state of the generator that draws where no seed was given.

    Returns:
        A `keras.Variable`; the generator is made if there is none.
    """
    return _global_seed_generator().state


def has_own_test_step(model: Any) -> bool:
    """Tells whether the model's class overrides `test_step`.

    Args:
        model: A `keras.Model`.
    """
    return bool(type(model).test_step is not keras.Model.test_step)


def has_own_train_step(model: Any) -> bool:
    """Tells whether the model's class overrides `train_step`.

    Args:
        model: A `keras.Model`.
    """
    return bool(type(model).train_step is not keras.Model.train_step)
