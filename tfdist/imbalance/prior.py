"""Probabilities for the shares of classes that there are, not those trained on."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfdist.errors import ArgumentError


def as_shares(given: Any, name: str) -> list[float]:
    """Makes shares of counts or shares.

    Args:
        given: Array of shape [classes], above 0.
        name: The argument's name, for messages.

    Raises:
        ArgumentError: They are not at least two numbers above 0.
    """
    values = np.asarray(given, np.float64)
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
    """Multiplies probabilities of classes by factors, and makes them add up to 1 again.

    Args:
        log_factors: The factors' logarithms, one for each class.
        from_logits: Whether inputs are logits; outputs then are too.
        **options: Of `keras.layers.Layer`.
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
        """Gives the shape of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Gives what the layer is made again from."""
        return {
            **super().get_config(),
            "log_factors": self.log_factors,
            "from_logits": self.from_logits,
        }


def correct_prior(
    model: Any, true: Any, trained: Any = None, *, from_logits: bool = False
) -> Any:
    """Makes a model's probabilities fit the classes' true shares, after training on others.

    A model that was trained on other shares of classes than it will meet, by a sampler or by
    class weights, gives probabilities for those. p(c) becomes proportional to p(c) *
    true(c) / trained(c) (Saerens, Latinne and Decaestecker, "Adjusting the outputs of a
    classifier to new a priori probabilities", Neural Computation 2002, equation 2.4). It
    holds as far as the model's probabilities were right for the shares trained on.

    Args:
        model: A `keras.Model` with one output of shape [..., classes], or [..., 1] for the
            probability of the second class of two.
        true: Shares or counts of the classes where the model will be used, shape [classes].
        trained: Those that it was trained on; equal ones if None, as with
            `ClassBalanced()`, `Undersample()`, `Oversample()` and
            `class_weight="balanced"`.
        from_logits: Whether the model gives logits rather than probabilities. The model
            that is returned gives the same.

    Returns:
        A `keras.Model` that shares the given one's layers and weights, not compiled.

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
    now = as_shares(true, "true")
    before = [1.0 / len(now)] * len(now) if trained is None else as_shares(trained, "trained")
    outputs = getattr(model, "outputs", None)
    if outputs is not None and len(outputs) != 1:
        raise ArgumentError(
            f"`model` must have one output. Received: a model with {len(outputs)}. Correct a "
            "keras.Model of the output that gives the classes."
        )
    width = None if outputs is None else outputs[0].shape[-1]
    expected = len(now) if width is None else {1: 2}.get(width, width)
    if not len(now) == len(before) == expected:
        raise ArgumentError(
            "`true` and `trained` must have a number for each class. Received: "
            f"{len(now)} and {len(before)} numbers, and a model with {expected} classes."
        )
    factors = [float(np.log(a / b)) for a, b in zip(now, before, strict=True)]
    shift = PriorShift(factors, from_logits=from_logits, name="prior_shift")
    if outputs is None:  # a subclassed model, which has no symbolic inputs
        return keras.Sequential([model, shift])
    return keras.Model(model.inputs, shift(outputs[0]))
