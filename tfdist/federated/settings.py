"""The settings of federated training."""

from __future__ import annotations

import json
import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import keras

from tfdist.errors import ArgumentError
from tfdist.federated.protection import ClientProtection, ExampleProtection
from tfdist.federated.secure_sum import SecureSum


@dataclass(frozen=True, kw_only=True, eq=False)
class FedAvg:
    """Federated averaging: the argument `federated` of `fit`.

    In each round, each of the round's clients starts from the server's weights w and makes
    local steps on its own rows, with the model's optimizer, to weights y. The server's update
    is Delta = sum of p * (w - y) over the clients. A round is an epoch of `fit`. `batch_size`
    is the number of rows of one local step of one client.

    Who the clients are:

    - With `clients`, all rows with the same id belong to one client. Replicas train several
      clients one after the other, and the result does not depend on the number of replicas.
    - With `shard="local"` and without `clients`, each worker is a client.
    - Otherwise each replica is a client, with an equal part of all rows. This is local SGD,
      for slow networks.

    Args:
        local_steps: Steps of a client in a round. A client goes on with its rows where it
            stopped.
        local_epochs: Instead: how often a client uses each of its rows in a round. If both
            are None, once.
        server_optimizer: Applies Delta to the trainable weights, as if it was a gradient. SGD
            with momentum is FedAvgM, Adam is FedAdam, Adagrad is FedAdagrad. None averages
            the weights. Each call of `fit` begins with a new one of the same settings.
        proximal: The mu of FedProx: adds mu * (y - w) to each gradient of a client.
        clients: The client of each row: whole numbers or strings, shape [rows]. With
            `shard="local"`, of the rows of this worker.
        clients_per_round: Number of clients of a round, drawn anew for each round; all
            clients that hold rows if None.
        weighting: "examples": p is a client's part of the rows of the round's clients.
            "uniform": all clients of a round weigh the same. With a `tfdist.ClientDP`,
            "examples" needs its `max_examples`.
        keep_optimizer: Whether each client keeps its optimizer's state from round to round.
            Otherwise it begins each round with a new optimizer.
        secure: A `tfdist.SecureSum`: workers see the sum of all updates only.
        privacy: The weights are differentially private. A `tfdist.ClientDP` protects all rows
            of a client together. It draws the clients of a round, and needs `local_steps`, and
            weighting="uniform" or `max_examples`. A `tfdist.DPSGD` protects single rows: each
            local step is a private step of its client, with all noise of its own. It needs
            `local_steps`, and all clients in each round.

    Raises:
        ArgumentError: An argument is not valid.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
        >>> averaging = tfdist.FedAvg(local_steps=2, clients=[0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
        >>> history = tfdist.fit(model, x, y, epochs=3, verbose=0, federated=averaging)
        >>> len(history.history["loss"])
        3

    Source:
        McMahan et al., "Communication-efficient learning of deep networks from decentralized
        data", AISTATS 2017, algorithm 1. Server optimizers: Reddi et al., "Adaptive federated
        optimization", ICLR 2021, algorithms 1 and 2. `proximal`: Li et al., "Federated
        optimization in heterogeneous networks", MLSys 2020.
    """

    local_steps: int | None = None
    local_epochs: int | None = None
    server_optimizer: Any = None
    proximal: float = 0.0
    clients: Any = None
    clients_per_round: int | None = None
    weighting: str = "examples"
    keep_optimizer: bool = False
    secure: SecureSum | None = None
    privacy: ClientProtection | ExampleProtection | None = None

    def __post_init__(self) -> None:
        for name in ("local_steps", "local_epochs", "clients_per_round"):
            self._check_whole(name)
        if self.local_steps is not None and self.local_epochs is not None:
            self._refuse("needs `local_steps` or `local_epochs`, not both", "local_epochs")
        is_optimizer = isinstance(self.server_optimizer, keras.optimizers.Optimizer)
        if self.server_optimizer is not None and not is_optimizer:
            self._refuse(
                "needs a keras.optimizers.Optimizer, or None, as `server_optimizer`",
                "server_optimizer",
            )
        if is_optimizer and self.server_optimizer.use_ema:
            self._refuse(
                "needs a `server_optimizer` without use_ema=True: Keras takes the averaged "
                "weights from the model's own optimizer only",
                "server_optimizer",
            )
        proximal: Any = self.proximal
        is_number = isinstance(proximal, numbers.Real) and not isinstance(proximal, bool)
        if not is_number or not 0 <= proximal < math.inf:
            self._refuse("needs a `proximal` of at least 0", "proximal")
        object.__setattr__(self, "proximal", float(proximal))
        if self.weighting not in ("examples", "uniform"):
            self._refuse("needs 'examples' or 'uniform' as `weighting`", "weighting")
        keeps: Any = self.keep_optimizer
        if not isinstance(keeps, bool):
            self._refuse("needs True or False as `keep_optimizer`", "keep_optimizer")
        self._check_secure()
        self._check_privacy()

    def _check_secure(self) -> None:
        secure: Any = self.secure
        if secure is None:
            return
        if not isinstance(secure, SecureSum):
            self._refuse("needs a tfdist.SecureSum, or None, as `secure`", "secure")
        if self.keep_optimizer:
            self._refuse(
                "needs keep_optimizer=False with `secure`: a checkpoint collects what clients "
                "keep, without masks",
                "keep_optimizer",
            )

    def _check_privacy(self) -> None:
        privacy: Any = self.privacy
        if privacy is None:
            return
        if not isinstance(privacy, ClientProtection | ExampleProtection):
            self._refuse(
                "needs a tfdist.ClientDP, a tfdist.DPSGD or None as `privacy`", "privacy"
            )
        if self.local_steps is None:
            self._refuse(
                "needs `local_steps` with `privacy`: the model's optimizer counts steps, and "
                "must not show how many rows a client has",
                "local_steps",
            )
        if isinstance(privacy, ClientProtection):
            self._check_protected_clients()
        elif self.clients_per_round is not None:
            self._refuse(
                "needs clients_per_round=None with privacy=DPSGD(...): the steps of each "
                "client are counted by rounds, in which all take part",
                "clients_per_round",
            )

    def _check_protected_clients(self) -> None:
        if self.clients_per_round is not None:
            self._refuse(
                "needs clients_per_round=None with `privacy`: the accounting is of clients "
                "that are drawn independently, not of a fixed number. Set the "
                "sampling_probability of ClientDP",
                "clients_per_round",
            )
        most = None if self.of_clients is None else self.of_clients.max_examples
        if self.weighting == "examples" and most is None:
            self._refuse(
                "needs weighting='uniform' with `privacy`, or ClientDP(max_examples=...): "
                "otherwise a client with many rows could contribute more than the norm to "
                "which it is clipped",
                "weighting",
            )
        if self.weighting == "uniform" and most is not None:
            self._refuse(
                "needs weighting='examples' with ClientDP(max_examples=...), which bounds the "
                "weight of a client with many rows",
                "weighting",
            )
        if self.keep_optimizer:
            self._refuse(
                "needs keep_optimizer=False with `privacy`: what clients keep has no noise, "
                "and would be in checkpoints",
                "keep_optimizer",
            )

    @property
    def of_clients(self) -> ClientProtection | None:
        """What protects whole clients, or None."""
        return self.privacy if isinstance(self.privacy, ClientProtection) else None

    def _check_whole(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or value < 1:
            self._refuse(f"needs a whole number of at least 1 as `{name}`", name)
        object.__setattr__(self, name, int(value))  # not a number of NumPy's: it is saved

    def _refuse(self, rule: str, name: str) -> None:
        raise ArgumentError(
            f"`{type(self).__name__}` {rule}. Received: {name}={getattr(self, name)!r}."
        )

    def steps_of(self, steps_per_pass: int) -> int:
        """Returns the local steps of a client in a round.

        Args:
            steps_per_pass: The steps in which the client uses each of its rows once.
        """
        if self.local_steps is not None:
            return self.local_steps if steps_per_pass else 0
        return (self.local_epochs or 1) * steps_per_pass

    def describe(self) -> dict[str, Any]:
        """Returns the settings as plain data, without the ids of clients."""
        server = self.server_optimizer
        settings = None if server is None else keras.optimizers.serialize(server)
        return {
            "local_steps": self.local_steps,
            "local_epochs": self.local_epochs,
            "server_optimizer": json.dumps(
                _without_name(settings), sort_keys=True, default=str
            ),
            "proximal": self.proximal,
            "clients_per_round": self.clients_per_round,
            "weighting": self.weighting,
            "keep_optimizer": self.keep_optimizer,
        }


def _nesterov() -> Any:
    return keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class DiLoCo(FedAvg):
    """Distributed low-communication training: many local steps, and Nesterov momentum.

    It is `FedAvg` with other defaults: the server applies Delta by SGD with a learning rate of
    0.7 and a Nesterov momentum of 0.9, and clients keep their optimizers. All arguments of
    `FedAvg` can be given.

    Example:
        >>> import tfdist
        >>> tfdist.DiLoCo(local_steps=50).keep_optimizer
        True

    Source:
        Douillard et al., "DiLoCo: Distributed low-communication training of language models",
        2023, algorithm 1 and section 3.1.
    """

    server_optimizer: Any = field(default_factory=_nesterov)
    keep_optimizer: bool = True


def _without_name(settings: Any) -> Any:
    """Removes the name of an optimizer, which Keras numbers in each process."""
    if isinstance(settings, dict):
        return {k: _without_name(v) for k, v in settings.items() if k != "name"}
    return settings


def check(federated: Any) -> FedAvg:
    """Checks the argument `federated` of `fit`, and returns it.

    Args:
        federated: As in `fit`.

    Raises:
        ArgumentError: It is no `FedAvg`.
    """
    if isinstance(federated, FedAvg):
        return federated
    raise ArgumentError(
        "`federated` must be None, a tfdist.FedAvg or a tfdist.DiLoCo. Received: "
        f"federated={federated!r}."
    )
