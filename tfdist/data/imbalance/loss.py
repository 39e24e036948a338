"""A loss that corrects for the classes' shares."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfdist.data.imbalance.prior import as_shares
from tfdist.errors import ArgumentError


@keras.saving.register_keras_serializable(package="tfdist")
class LogitAdjustedCrossentropy(keras.losses.Loss):  # type: ignore[misc]
    """Crossentropy with logit adjustment: tau times the log of the class's share is added.

    The model learns logits for equal class shares: it minimizes the balanced error, without
    resampling (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation
    10). Use the trained model's logits without an adjustment. To get probabilities for the
    true shares, pass the model to `correct_prior`.

    Args:
        counts: Rows of each class in the training data, or their shares, shape [classes].
        tau: The strength of the adjustment: 0 is plain crossentropy, 1 is for equal shares.
        reduction: As in Keras's losses.
        name: As in Keras's losses.
        dtype: As in Keras's losses.

    Raises:
        ArgumentError: A class never occurs, or `tau` is not a finite number.

    Example:
        >>> import numpy as np
        >>> from tfdist.imbalance import LogitAdjustedCrossentropy
        >>> loss = LogitAdjustedCrossentropy([1, 3])
        >>> loss(np.array([1]), np.array([[0.0, 0.0]])).numpy().round(4)  # -log(3/4)
        np.float32(0.2877)
    """

    def __init__(
        self,
        counts: Any,
        tau: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "logit_adjusted_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if not np.isfinite(tau):
            raise ArgumentError(f"`tau` must be a finite number. Received: tau={tau!r}.")
        self.shares = as_shares(counts, "counts")
        self.counts = np.asarray(counts, np.float64).tolist()
        self.tau = float(tau)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Computes the loss of each example.

        Args:
            y_true: Class numbers of shape [...] or [..., 1], or one-hot of shape
                [..., classes].
            y_pred: Logits of shape [..., classes], or [..., 1] for the second class of two.
        """
        width, classes = y_pred.shape[-1], len(self.shares)
        if {1: 2}.get(width, width) != classes:
            raise ArgumentError(
                "`counts` must have a number for each class. Received: "
                f"{classes} numbers, and logits of shape {tuple(y_pred.shape)}."
            )
        shift = self.tau * np.log(self.shares)
        if width == 1:
            adjusted = y_pred + ops.cast([shift[1] - shift[0]], y_pred.dtype)
            if len(y_true.shape) < len(y_pred.shape):
                y_true = ops.expand_dims(y_true, -1)
            return ops.mean(
                ops.binary_crossentropy(y_true, adjusted, from_logits=True), axis=-1
            )
        adjusted = y_pred + ops.cast(shift, y_pred.dtype)
        if len(y_true.shape) == len(y_pred.shape):
            if y_true.shape[-1] != 1:
                return ops.categorical_crossentropy(y_true, adjusted, from_logits=True)
            y_true = ops.squeeze(y_true, -1)
        labels = ops.cast(y_true, "int32")
        return ops.sparse_categorical_crossentropy(labels, adjusted, from_logits=True)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments from which the loss can be made again."""
        return {**super().get_config(), "counts": self.counts, "tau": self.tau}
