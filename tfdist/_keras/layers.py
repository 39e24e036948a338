"""Layers: their variables, their calls, and the compiled loss of a model.

`tests/privacy/test_clipping.py` has the contract tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.models import Functional as _Functional

_FLOAT32 = keras.dtype_policies.DTypePolicy("float32")


def own_variables(layer: Any) -> list[Any]:
    """Lists the trainable variables of a layer, without those of its sublayers.

    Relies on `Layer._trainable_variables`, which its tracker fills.

    Args:
        layer: A built `keras.Layer`.
    """
    return [v for v in layer._trainable_variables if layer.trainable and v.trainable]


def sublayers(layer: Any) -> list[Any]:
    """Lists the direct sublayers of a layer.

    Relies on `Layer._flatten_layers`.

    Args:
        layer: A `keras.Layer`.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


@contextlib.contextmanager
def called_through(layer: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Makes Keras call `function(call, *args, **kwargs)` instead of `layer.call`.

    Relies on `Layer.__call__`: it looks up `call` on the instance, or `quantized_call` of a
    quantized layer. Before that, it casts the arguments and fills in masks. It calls in the
    scope that casts variables.

    Args:
        layer: A built `keras.Layer`.
        function: A function of the layer's own `call` and its arguments.
    """
    name = "call" if getattr(layer, "quantization_mode", None) is None else "quantized_call"
    call = getattr(layer, name)
    instance_call = vars(layer).get(name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(call, *args, **kwargs)

    # Not with `setattr`: Keras would track the function as a part of the layer.
    vars(layer)[name] = replacement
    try:
        yield
    finally:
        if instance_call is None:
            del vars(layer)[name]
        else:
            vars(layer)[name] = instance_call


@contextlib.contextmanager
def with_attributes(layer: Any, **attributes: Any) -> Iterator[None]:
    """Changes attributes of a layer in this context, bypassing its locked tracker.

    Args:
        layer: A `keras.Layer`.
        **attributes: The values.
    """
    before = {name: vars(layer)[name] for name in attributes}
    vars(layer).update(attributes)
    try:
        yield
    finally:
        vars(layer).update(before)


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Lets a model's layers compute in float32 where they compute in 16 bits.

    Relies on `Layer._dtype_policy`. Quantized layers stay as they are.

    Args:
        model: A built `keras.Model`.
    """
    layers = model._flatten_layers()
    half = ("bfloat16", "float16")
    with contextlib.ExitStack() as stack:
        for layer in layers:
            # The type of computations follows from the policy. Weights keep their type.
            if layer.compute_dtype in half and layer.quantization_mode is None:
                stack.enter_context(with_attributes(layer, _dtype_policy=_FLOAT32))
        yield


def has_mask(tensor: Any) -> bool:
    """Returns whether Keras has attached a mask to a tensor.

    Relies on the attribute `_keras_mask`.

    Args:
        tensor: The output of a layer.
    """
    return getattr(tensor, "_keras_mask", None) is not None


def mask_of(tensor: Any) -> Any:
    """Returns the mask that a layer has attached to its output.

    Relies on `Tensor._keras_mask`.

    Args:
        tensor: A tensor with a mask; see `has_mask`.
    """
    return tensor._keras_mask


def give_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor, as layers do.

    Args:
        tensor: Any tensor.
        mask: Shape [rows, positions].
    """
    tensor._keras_mask = mask


def is_plain(layer: Any) -> bool:
    """Returns whether a layer computes with its trainable weights as they are.

    A layer that is quantized to 8 bits does if it trains a low-rank update (QLoRA).

    Args:
        layer: A `keras.Layer`.
    """
    mode = getattr(layer, "quantization_mode", None)
    return mode is None or (mode == "int8" and bool(getattr(layer, "lora_enabled", False)))


def is_seed(variable: Any) -> bool:
    """Returns whether a variable is the state of a seed generator.

    Relies on its name. Private training refuses a variable of this name that is assigned by
    other means than `SeedGenerator.next`: see `unfit_layers.check_untouched`.

    Args:
        variable: A `keras.Variable`.
    """
    return bool(variable.name == "seed_generator_state")


def seeds(layer: Any) -> list[Any]:
    """Lists the states of a layer's seed generators.

    Args:
        layer: A `keras.Layer`.
    """
    return [v for v in layer.non_trainable_variables if is_seed(v)]


def index_of(optimizer: Any, variable: Any) -> int:
    """Returns the index of a variable in an optimizer's lists of state.

    Relies on `Optimizer._get_variable_index`, which Keras's optimizers use.

    Args:
        optimizer: A built `keras.optimizers.Optimizer`.
        variable: A variable that the optimizer trains.
    """
    return int(optimizer._get_variable_index(variable))


_losses = keras.losses
# Each of these computes a loss for every example from this example only, and takes the mean.
_OF_EXAMPLES = (
    _losses.BinaryCrossentropy,
    _losses.BinaryFocalCrossentropy,
    _losses.CategoricalCrossentropy,
    _losses.CategoricalFocalCrossentropy,
    _losses.CategoricalHinge,
    _losses.CTC,
    _losses.CosineSimilarity,
    _losses.Hinge,
    _losses.Huber,
    _losses.KLDivergence,
    _losses.LogCosh,
    _losses.MeanAbsoluteError,
    _losses.MeanAbsolutePercentageError,
    _losses.MeanSquaredError,
    _losses.MeanSquaredLogarithmicError,
    _losses.Poisson,
    _losses.SparseCategoricalCrossentropy,
    _losses.SquaredHinge,
)
_FUNCTIONS = (
    _losses.binary_crossentropy,
    _losses.binary_focal_crossentropy,
    _losses.categorical_crossentropy,
    _losses.categorical_focal_crossentropy,
    _losses.categorical_hinge,
    _losses.ctc,
    _losses.cosine_similarity,
    _losses.hinge,
    _losses.huber,
    _losses.kl_divergence,
    _losses.log_cosh,
    _losses.mean_absolute_error,
    _losses.mean_absolute_percentage_error,
    _losses.mean_squared_error,
    _losses.mean_squared_logarithmic_error,
    _losses.poisson,
    _losses.sparse_categorical_crossentropy,
    _losses.squared_hinge,
)


def is_mean_over_examples(loss: Any, weighted: bool) -> bool:
    """Returns whether a compiled loss is certainly the mean of the examples' losses.

    Relies on `LossFunctionWrapper._fn_kwargs`, the options of the loss.

    Args:
        loss: A leaf of `model.loss`.
        weighted: Whether the examples have weights.
    """
    if isinstance(loss, str):
        if loss.lower() in ("crossentropy", "ce"):  # Keras chooses one of three
            return True
        loss = _losses.get(loss)
    # Keras takes the mean of what a function returns.
    if loss in _FUNCTIONS:
        return True
    if type(loss) not in _OF_EXAMPLES:
        return False
    options = loss._fn_kwargs
    # The mean does not count ignored targets.
    if options.get("axis", -1) != -1 or options.get("ignore_class") is not None:
        return False
    means = ("sum_over_batch_size", "mean", *(() if weighted else ("mean_with_sample_weight",)))
    return loss.reduction in means


def is_graph_of_layers(model: Any) -> bool:
    """Returns whether a model consists of layers only, without custom code.

    Relies on the class `Functional`, which `keras.Model(inputs, outputs)` makes.

    Args:
        model: A layer or model.
    """
    return type(model) in (keras.Sequential, _Functional)


def losses_of(model: Any) -> list[Any]:
    """Lists the losses with which a model was compiled.

    Args:
        model: A compiled `keras.Model`.
    """
    return [loss for loss in tf.nest.flatten(model.loss) if loss is not None]


def has_own_compute_loss(model: Any) -> bool:
    """Returns whether the model's class overrides `compute_loss`.

    Args:
        model: A `keras.Model`.
    """
    return bool(type(model).compute_loss is not keras.Model.compute_loss)


def compiled_loss(model: Any, x: Any, y: Any, outputs: Any, sample_weight: Any) -> Any:
    """Computes the loss that training minimizes.

    Relies on `Trainer._compute_loss`, which also calls a `compute_loss` without `training`.

    Args:
        model: A compiled `keras.Model`.
        x: Inputs.
        y: Targets.
        outputs: The model's outputs.
        sample_weight: The weights of the examples, or None.
    """
    return model._compute_loss(
        x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True
    )


@contextlib.contextmanager
def without_regularizers(variables: Sequence[Any]) -> Iterator[None]:
    """Removes the regularizers of variables while the context lasts.

    Args:
        variables: `keras.Variable`s.
    """
    before = [v.regularizer for v in variables]
    try:
        for variable in variables:
            variable.regularizer = None
        yield
    finally:
        for variable, regularizer in zip(variables, before, strict=True):
            variable.regularizer = regularizer


def track_loss(model: Any, loss: Any, examples: Any) -> None:
    """Adds a loss to the metric that the progress bar shows.

    Relies on `Trainer._loss_tracker`.

    Args:
        model: A compiled `keras.Model`.
        loss: Scalar, the loss of a batch.
        examples: Number of examples of the batch.
    """
    model._loss_tracker.update_state(loss, sample_weight=examples)
