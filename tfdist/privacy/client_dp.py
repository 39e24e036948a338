"""The settings of client-level privacy."""

from __future__ import annotations

from dataclasses import dataclass, field

from tfdist.errors import ArgumentError
from tfdist.federated.protection import ClientProtection
from tfdist.privacy.accounting.arguments import check_count, check_number
from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.settings import check_adaptive, check_guarantee


@dataclass(frozen=True)
class ClientDP(ClientProtection):
    """Differential privacy of whole clients, for `FedAvg(privacy=ClientDP(...))`.

    Each round draws every client independently, with `sampling_probability`. A client's update
    is the change of all weights by its local steps. It is clipped to a norm. The clipped
    updates are summed over all replicas, Gaussian noise is added to the sum, and the result is
    divided by the expected number of drawn clients, which the server applies. The server's
    model depends on clients by nothing else. So whatever is concluded from it hardly depends on
    any one client, with all of its rows. Pass either `noise_multiplier` or `target_epsilon`.

    Args:
        l2_norm_clip: The norm, over all variables, to which each client's update is clipped;
            between 1e-10 and 1e15. With `target_quantile` it is the norm of the first round.
        noise_multiplier: The noise's standard deviation on the sum over all clients, in units
            of `l2_norm_clip`. 0 adds no noise, and then nothing is private.
        target_epsilon: The largest epsilon of all rounds on these clients, with those in
            `spent` and those of earlier `fit`s of the model. The noise is calibrated for it.
        delta: Between 0 and 1, far below 1 / the number of clients.
        sampling_probability: The probability with which a round draws each client, above 0 and
            at most 1.
        accountant: "pld" or "rdp", as in `tfdist.privacy.epsilon`.
        relation: The neighbouring relation, as in `tfdist.privacy.epsilon`, between sets of
            clients.
        target_quantile: The fraction of clients whose updates shall not be clipped, between 0
            and 1. A noisy count of clients within the norm then moves it after each round
            (Andrew et al., "Differentially private learning with adaptive clipping", NeurIPS
            2021). The noise of both is chosen so that together they cost as much as
            `noise_multiplier`. None keeps the norm fixed.
        clip_learning_rate: The learning rate of the norm's logarithm, above 0.
        count_noise: The standard deviation of the noise on that count. None is a twentieth of
            the expected number of drawn clients. It must be above `noise_multiplier` / 2.
        max_examples: For weighting="examples" of `FedAvg`: a client with n rows has the weight
            min(n, max_examples) / max_examples, which is at most 1. So no clipped update counts
            more than `l2_norm_clip`. The divisor stays that of equal weights, and does not show
            how many rows clients have: the server's update is smaller by the mean weight, which
            a larger rate of the `server_optimizer` makes up for.
        spent: Rounds that were made with the same clients before, for example by another
            process. Those of earlier `fit`s of the same model in this process are counted
            anyway.
        seed: The seed of the noise, and of the drawn clients unless `fit` has a `seed`. It is
            for tests: a training with a known seed is not private, and the report says so. None
            draws from the operating system.

    Raises:
        ArgumentError: A value is out of its range, or not exactly one of `noise_multiplier`
            and `target_epsilon` was given.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((1000, 4), "float32"), np.ones((1000, 1), "float32")
        >>> privacy = tfdist.ClientDP(
        ...     0.5, noise_multiplier=2.0, delta=1e-3, sampling_probability=0.1
        ... )
        >>> averaging = tfdist.FedAvg(
        ...     local_steps=2, clients=np.arange(1000) // 2, weighting="uniform",
        ...     privacy=privacy,
        ... )
        >>> history = tfdist.fit(model, x, y, epochs=10, verbose=0, federated=averaging)
        >>> history.privacy.ledger.steps, round(history.privacy.epsilon, 1)
        (10, 0.4)

    Source:
        McMahan et al., "Learning differentially private recurrent language models", ICLR 2018,
        algorithm 1, with the estimator of fixed denominator and flat clipping.
    """

    l2_norm_clip: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    sampling_probability: float = 1.0
    accountant: str = "pld"
    relation: str = "add_or_remove_one"
    target_quantile: float | None = None
    clip_learning_rate: float = 0.2
    count_noise: float | None = None
    max_examples: int | None = None
    spent: Ledger = field(default_factory=Ledger)
    seed: int | None = None

    @property
    def bands(self) -> int | None:
        """None: the noise of rounds is independent."""
        return None

    def __post_init__(self) -> None:
        check_guarantee(self, "clients", takes_schedules=False)
        check_number("sampling_probability", self.sampling_probability, 0, 1)
        if self.sampling_probability == 0:
            raise ArgumentError(
                "`sampling_probability` must be above 0. Received: sampling_probability=0."
            )
        if self.max_examples is not None:
            check_count("max_examples", self.max_examples, 1)
        check_adaptive(self.target_quantile, self.clip_learning_rate, self.count_noise)
