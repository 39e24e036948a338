"""Client-level privacy without sampling: clients take turns, and noise is correlated."""

from __future__ import annotations

from dataclasses import dataclass

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count
from tfdist.privacy.client_dp import ClientDP


@dataclass(frozen=True)
class ClientDPFTRL(ClientDP):
    """Privacy of whole clients without sampling, for `FedAvg(privacy=ClientDPFTRL(...))`.

    Clients are split once, at random, into `turns` groups, which take turns: a client takes
    part in every `turns`-th round. So no round is drawn in secret. Instead, each round
    subtracts a part of the noise of the rounds before it. The server's weights are the sum of
    all rounds, and have much less noise then (Kairouz et al., "Practical and private (deep)
    learning without sampling or shuffling", ICML 2021; the factors are those of
    `tfdist.DPFTRL`). All rounds together are one Gaussian mechanism.

    Args:
        turns: The number of groups. The server divides by the clients over `turns`.
        bands: The number of rounds whose noise a round combines, with its own. 1 is
            independent noise.
        relation: "replace_special", or "replace_one". An added client would move others to
            other groups.

    The other arguments are those of `ClientDP`, with these differences: `noise_multiplier` is
    the noise that a round draws, before parts of it are subtracted. `sampling_probability` must
    be 1, and `target_quantile` None. A `SecureSum` cannot be used, since the noise is added to
    the sum. Only `seed` makes the noise known, not the `seed` of `fit`.

    Raises:
        ArgumentError: As in `ClientDP`, or a value is out of its range.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((1000, 4), "float32"), np.ones((1000, 1), "float32")
        >>> privacy = tfdist.ClientDPFTRL(0.5, noise_multiplier=8.0, delta=1e-3, turns=10)
        >>> averaging = tfdist.FedAvg(
        ...     local_steps=2, clients=np.arange(1000) // 2, weighting="uniform",
        ...     privacy=privacy,
        ... )
        >>> history = tfdist.fit(model, x, y, epochs=10, verbose=0, federated=averaging)
        >>> history.privacy.ledger.steps, round(history.privacy.epsilon, 1)
        (10, 0.4)
    """

    relation: str = "replace_special"
    turns: int = 1
    bands: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("turns", self.turns, 1)
        check_count("bands", self.bands, 1)
        if self.relation == "add_or_remove_one":
            raise ArgumentError(
                "`relation` must be 'replace_special' or 'replace_one' with ClientDPFTRL: an "
                "added client would move others to other groups. Received: "
                f"relation={self.relation!r}. Use one of the two."
            )
        if self.sampling_probability != 1:
            raise ArgumentError(
                "`sampling_probability` must be 1 with ClientDPFTRL: clients that are drawn "
                "may take part in neighbouring rounds, of which one subtracts the noise of the "
                f"other. Received: sampling_probability={self.sampling_probability!r}. Set "
                "`turns`, or use ClientDP."
            )
        if self.target_quantile is not None:
            raise ArgumentError(
                "`target_quantile` must be None with ClientDPFTRL: later rounds subtract "
                "noise, which must be of the same norm. Received: "
                f"target_quantile={self.target_quantile!r}. Leave it out, or use ClientDP."
            )
