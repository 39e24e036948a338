"""What federated training does not take, each refused in one sentence."""

from __future__ import annotations

from typing import Any

from tfdist import _keras, data
from tfdist.data.local import LocalShard
from tfdist.errors import ArgumentError
from tfdist.federated.clients import Clients
from tfdist.federated.secure_sum import LEAST_WORKERS, SecureSum
from tfdist.federated.settings import FedAvg
from tfdist.federated.source import Rounds
from tfdist.samplers import Sequential, Uniform
from tfdist.step.composition import compose, traced_steps, why_whole
from tfdist.step.state import optimizers_of
from tfdist.strategies.base import Strategy
from tfdist.strategies.whole import as_whole
from tfdist.training import callback_kinds
from tfdist.training.request import Request

_ROWS = 8


def check_request(request: Request, protects: bool = False) -> None:
    """Refuses arguments of `fit` that federated training does not take.

    Args:
        request: The arguments of `fit`.
        protects: Whether `FedAvg` has `privacy`.

    Raises:
        ArgumentError: There is such an argument.
    """
    _check_strategy(request.session.strategy)
    if request.session.zero is not None:
        _refuse(
            "gives each client a whole optimizer",
            f"strategy={request.session.zero!r}",
            "Use the strategy without `Zero`.",
        )
    if request.is_private and not protects:
        _refuse(
            "trains without the `privacy` of `fit`",
            "privacy",
            "Pass it to FedAvg: FedAvg(privacy=DPSGD(...)) protects rows, and "
            "FedAvg(privacy=ClientDP(...)) whole clients.",
        )
    _check_data(request)
    if request.steps_per_epoch is not None:
        _refuse(
            "makes a round in each epoch",
            f"steps_per_epoch={request.steps_per_epoch}",
            "Set `local_steps` or `local_epochs` of `FedAvg`.",
        )
    if request.whole_batch:
        _refuse("gives each client a batch of its own", "whole_batch=True", "Leave it out.")
    if request.model.steps_per_execution != 1:
        _refuse(
            "makes one round in an execution",
            f"steps_per_execution={request.model.steps_per_execution}",
            "Compile without it: a round's local steps run together anyway.",
        )
    for callback in callback_kinds.listed(request.callbacks):
        if callback_kinds.scales_rate_by_replicas(callback):
            _refuse(
                "has batches whose size does not grow with the number of replicas",
                f"a {type(callback).__name__} among `callbacks`",
                "Leave it out.",
            )


def _check_data(request: Request) -> None:
    if not data.is_arrays(request.x):
        _refuse(
            "needs arrays, whose rows belong to clients",
            f"x of type {type(request.x).__name__}",
            "Pass arrays.",
        )
    if request.sampler is not None and not isinstance(request.sampler, Sequential | Uniform):
        _refuse(
            "draws each client's rows by `shuffle`",
            f"a sampler of type {type(request.sampler).__name__}",
            "Leave `sampler` out; `class_weight` and `sample_weight` can be used.",
        )
    if request.augment is not None:
        _refuse(
            "changes no examples",
            "augment",
            "Put the preprocessing layers into the model.",
        )
    shard = request.shard
    if isinstance(shard, LocalShard) and shard.weight_by != "examples":
        _refuse(
            "weighs clients itself",
            f"LocalShard(weight_by={shard.weight_by!r})",
            "Use shard='local' and FedAvg(weighting='uniform').",
        )


def _check_strategy(strategy: Strategy) -> None:
    place = strategy.place
    obstacle = None
    if not strategy.synchronous or strategy.has_servers:
        obstacle = "whose variables are on servers"
    elif strategy.elastic:
        obstacle = "whose workers may leave with their clients"
    elif not strategy.sums_gradients:
        obstacle = "which combines gradients in another way than by their sum"
    elif place.num_shares != place.num_replicas:
        obstacle = "whose replicas share a batch"
    if obstacle is not None:
        _refuse(
            "needs replicas that each have the whole model, and a sum over them",
            f"{strategy.name}, {obstacle}",
            "Use single, mirrored, multi_worker, or horovod that is not elastic.",
        )


def check_secure(request: Request, secure: SecureSum) -> None:
    """Refuses secure sums that would tell what they should hide.

    Args:
        request: The arguments of `fit`.
        secure: The settings.

    Raises:
        ArgumentError: There are too few workers, or an argument needs more than sums.
    """
    place = request.session.strategy.place
    if place.num_workers < LEAST_WORKERS:
        _refuse(
            f"needs at least {LEAST_WORKERS} workers for a secure sum: of two, the sum tells "
            "each the other's update",
            f"{place.num_workers} with secure={secure!r}",
            "Use more workers, or leave `secure` out.",
        )
    secure.check_width(place.num_replicas)
    if request.class_weight is not None and not isinstance(request.class_weight, dict):
        _refuse(
            "counts no classes over workers with a secure sum",
            f"class_weight={request.class_weight!r}",
            "Pass a dict.",
        )


def check_clients(clients: Clients, settings: FedAvg) -> None:
    """Refuses clients that depend on the replicas, if they are to be protected.

    Args:
        clients: The clients.
        settings: The settings.

    Raises:
        ArgumentError: They are such clients.
    """
    if settings.privacy is not None and clients.kind == "replica":
        _refuse(
            "must know whose rows are whose to protect clients",
            "`privacy` of FedAvg without `clients`",
            "Pass FedAvg(clients=ids), or shard='local'.",
        )


def check_model(request: Request, source: Rounds) -> None:
    """Refuses models of which it is not known what local steps change.

    Args:
        request: The arguments of `fit`.
        source: The training data.

    Raises:
        ArgumentError: The model is such a one.
    """
    model = request.model
    raw = [name for step in traced_steps(model) for name in step.raw]
    if raw:
        _refuse(
            "must know all that a step changes",
            f"a step that writes the tf.Variable {raw[0]!r}",
            "Make it a non-trainable weight of a layer.",
        )
    stateful = [layer.name for layer in _keras.layers_of(model) if _is_stateful(layer)]
    if stateful:
        _refuse(
            "has batches of several clients, one after the other",
            f"the stateful layer {stateful[0]!r}",
            "Make it with stateful=False.",
        )
    averaging = [o for o in optimizers_of(model) if getattr(o, "use_ema", False)]
    if averaging:
        _refuse(
            "averages weights over clients, not over steps",
            f"{type(averaging[0]).__name__}(use_ema=True)",
            "Compile without it.",
        )
    metric = _keras.metric_that_begins_elsewhere(model)
    sample = source.sample(_ROWS)
    if metric is None and sample is not None:
        step = _keras.step_of(model, "train_step")
        metric = _keras.metric_that_is_no_sum(step, sample, _ROWS)
    if metric is not None:
        _refuse(
            "sums up the state of metrics over clients",
            f"the metric {metric!r}, whose state is no sum",
            "Leave it out, or compute it after `fit`: tfdist.evaluate.",
        )
    validates = request.validation_data is not None or request.validation_split
    strategy = request.session.strategy
    if validates and as_whole(compose(model, "test_step", source, strategy)) is not None:
        _refuse(
            "has no validation of batches that replicas cannot share",
            f"validation data; {why_whole(model, 'test_step')}",
            "Evaluate it after `fit`: tfdist.evaluate.",
        )


def _is_stateful(layer: Any) -> bool:
    return bool(getattr(layer, "stateful", False))


def _refuse(rule: str, received: str, remedy: str) -> None:
    raise ArgumentError(f"Federated training {rule}. Received: {received}. {remedy}")
