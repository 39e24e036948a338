"""Corrects a model's probabilities for other class shares than those in its training."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfdist.errors import ArgumentError


def as_shares(counts_or_shares: Any, name: str) -> list[float]:
    """Turns counts or shares into shares that add up to 1.

    Args:
        counts_or_shares: Array of shape [classes], above 0.
        name: The argument's name, for messages.

    Raises:
        ArgumentError: There are fewer than two numbers, or one is not above 0.
    """
    values = np.asarray(counts_or_shares, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ArgumentError(
            f"`{name}` must have a number for each of at least two classes. Received: "
            f"{name} with shape {values.shape}."
        )
    if not (np.isfinite(values) & (values > 0)).all():
        raise ArgumentError(
            f"`{name}` must hold numbers above 0: each class must occur. Received: "
            f"{name}={values.tolist()}."
        )
    shares: list[float] = (values / values.sum()).tolist()
    return shares


@keras.saving.register_keras_serializable(package="tfdist")
class PriorShift(keras.layers.Layer):  # type: ignore[misc]
    """Multiplies class probabilities by factors, and normalizes them.

    Args:
        log_factors: The factors' logarithms, one for each class.
        from_logits: Whether inputs and outputs are logits.
        **options: Options of `keras.layers.Layer`.
    """

    def __init__(
        self, log_factors: list[float], from_logits: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.log_factors = [float(value) for value in log_factors]
        self.from_logits = from_logits

    def call(self, inputs: Any) -> Any:
        """Shifts inputs of shape [..., classes], or [..., 1] for the second class of two."""
        binary = inputs.shape[-1] == 1
        factors = self.log_factors
        shift = [factors[1] - factors[0]] if binary else factors
        shift = ops.cast(shift, inputs.dtype)
        if self.from_logits:
            return inputs + shift
        # The largest factor is 1, so no product overflows.
        odds = ops.exp(shift - ops.max(shift))
        if not binary:
            weighted = inputs * odds
            return weighted / ops.sum(weighted, -1, keepdims=True)
        up, down = ops.exp(ops.minimum(shift, 0.0)), ops.exp(ops.minimum(-shift, 0.0))
        # p * f / (p * f + 1 - p), with both sides divided by max(f, 1)
        return inputs * up / (inputs * up + (1.0 - inputs) * down)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the shape of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments from which the layer can be made again."""
        return {
            **super().get_config(),
            "log_factors": self.log_factors,
            "from_logits": self.from_logits,
        }


def correct_prior(
    model: Any, true: Any, trained: Any = None, *, from_logits: bool = False
) -> Any:
    """Corrects a model's probabilities for the true class shares.

    A sampler or class weights change the class shares in training. The model's probabilities
    then belong to these shares. The correction makes p(c) proportional to p(c) * true(c) /
    trained(c) (Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to
    new a priori probabilities", Neural Computation 2002, equation 2.4). The result is as good
    as the model's probabilities for the shares in training.

    Args:
        model: A `keras.Model` with one output of shape [..., classes], or [..., 1] for the
            probability of the second class of two.
        true: Shares or counts of the classes in the model's use, shape [classes].
        trained: Shares or counts of the classes in training. None means equal shares, as with
            `ClassBalanced()`, `Undersample()`, `Oversample()` and
            `class_weight="balanced"`.
        from_logits: Whether the model's outputs are logits; then the result's outputs are
            logits too.

    Returns:
        A `keras.Model`, not compiled, which shares the layers and weights of `model`.

    Raises:
        ArgumentError: Shares are not above 0 or do not match the output, or there are
            several outputs.

    Example:
        >>> import keras, numpy as np
        >>> from tfdist.imbalance import correct_prior
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "sigmoid")])
        >>> rare = correct_prior(model, true=[99, 1])
        >>> float(rare(np.zeros((1, 1), "float32"))[0, 0])  # 0.5 to the model itself
        0.009999999776482582
    """
    true_shares = as_shares(true, "true")
    trained_shares = (
        [1.0 / len(true_shares)] * len(true_shares)
        if trained is None
        else as_shares(trained, "trained")
    )
    outputs = getattr(model, "outputs", None)
    if outputs is not None and len(outputs) != 1:
        raise ArgumentError(
            f"`model` must have one output. Received: a model with {len(outputs)}. Correct a "
            "keras.Model of the output that gives the classes."
        )
    width = None if outputs is None else outputs[0].shape[-1]
    expected = len(true_shares) if width is None else {1: 2}.get(width, width)
    if not len(true_shares) == len(trained_shares) == expected:
        raise ArgumentError(
            "`true` and `trained` must have a number for each class. Received: "
            f"{len(true_shares)} and {len(trained_shares)} numbers, and a model with "
            f"{expected} classes."
        )
    factors = [float(np.log(a / b)) for a, b in zip(true_shares, trained_shares, strict=True)]
    shift = PriorShift(factors, from_logits=from_logits, name="prior_shift")
    if outputs is None:  # a subclassed model has no symbolic inputs
        return keras.Sequential([model, shift])
    return keras.Model(model.inputs, shift(outputs[0]))
