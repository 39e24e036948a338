"""Adam with the variance of the noise subtracted from its second moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tfdist._keras import layers as keras_layers
from tfdist.privacy.accounting.arguments import check_number

Tensor = Any


@keras.saving.register_keras_serializable("tfdist")
class DPAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Adam whose second moment excludes the noise of private training.

    Adam divides by the root of the mean square of gradients. In private training this mean
    square is mostly that of the noise, and Adam is then little more than SGD. `DPAdam`
    subtracts the noise's variance, which is known: the step is m / sqrt(max(v - variance,
    floor)), with Adam's bias corrections of m and v (Tang, Shpilevskiy and Lécuyer,
    "DP-AdamBC: your DP-Adam is actually DP-SGD (unless you apply bias correction)", AAAI 2024,
    algorithm 1). It costs no privacy. `fit` provides the variance. Without privacy it is 0.

    Args:
        learning_rate: As in `keras.optimizers.Adam`.
        beta_1: As in `keras.optimizers.Adam`.
        beta_2: As in `keras.optimizers.Adam`.
        variance_floor: The least mean square by whose root the step is divided, above 0. It
            bounds how far a weight with gradients near 0 moves. A smaller floor allows larger
            steps.
        **options: Other arguments of `keras.optimizers.Adam`, except `amsgrad` and `epsilon`.

    Raises:
        ArgumentError: `variance_floor` is not above 0.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(tfdist.privacy.DPAdam(0.01), "mse")
        >>> x, y = np.ones((100, 4), "float32"), np.ones((100, 1), "float32")
        >>> privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=2.0, delta=1e-3)
        >>> history = tfdist.fit(model, x, y, batch_size=10, verbose=0, privacy=privacy)
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        variance_floor: float = 5e-8,
        name: str = "dp_adam",
        **options: Any,
    ) -> None:
        check_number("variance_floor", variance_floor, 0, open_ends=True)
        super().__init__(learning_rate, beta_1, beta_2, name=name, **options)
        self.variance_floor = variance_floor
        self.noise_deviation: Callable[[], Any] | None = None  # set by private training

    def build(self, variables: Any) -> None:
        """Adds the moving mean of the noise's variances, which may differ between steps."""
        if self.built:
            return
        super().build(variables)
        self._noise_moments = [
            self.add_variable((), name=f"noise_moment_{number}")
            for number in range(len(variables))
        ]

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Any) -> None:
        """Updates one variable. See the class."""
        dtype = variable.dtype
        rate, gradient = ops.cast(learning_rate, dtype), ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        corrections = [
            1 - ops.power(ops.cast(beta, dtype), step) for beta in (self.beta_1, self.beta_2)
        ]
        number = keras_layers.index_of(self, variable)
        deviation = 0.0 if self.noise_deviation is None else self.noise_deviation()
        mean, square, noise = (
            self._toward(moments[number], value, beta)
            for moments, value, beta in (
                (self._momentums, gradient, self.beta_1),
                (self._velocities, ops.square(gradient), self.beta_2),
                (self._noise_moments, ops.square(ops.cast(deviation, "float32")), self.beta_2),
            )
        )
        # The moments of squares and of the noise decay alike, so one bias correction fits their
        # difference.
        noiseless = (square - ops.cast(noise, dtype)) / corrections[1]
        divisor = ops.sqrt(ops.maximum(noiseless, ops.cast(self.variance_floor, dtype)))
        self.assign_sub(variable, rate * mean / (corrections[0] * divisor))

    def _toward(self, moment: Any, value: Tensor, beta: float) -> Tensor:
        self.assign_add(moment, (value - moment) * (1 - beta))
        return ops.convert_to_tensor(moment)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments for `from_config`."""
        config = super().get_config()
        for name in ("amsgrad", "epsilon"):
            config.pop(name, None)
        return {**config, "variance_floor": self.variance_floor}
