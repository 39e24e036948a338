"""Federated training on Flower: `client_app` for its nodes, `server_app` for its server."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras, api
from tfdist.errors import ArgumentError
from tfdist.federated.flower import client, messages, server
from tfdist.federated.flower.messages import RoundTask
from tfdist.federated.flower.request import request_of
from tfdist.federated.flower.settings import ServerSettings
from tfdist.federated.settings import FedAvg
from tfdist.federated.state import state_of
from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.settings import DPSGD
from tfdist.resume.checkpoint import Checkpoint, CheckpointRun
from tfdist.samplers import Sequential
from tfdist.step.composition import compose
from tfdist.strategies.base import Strategy
from tfdist.strategies.session import current
from tfdist.training.extension import Continuation, Extension
from tfdist.training.sources import read

__all__ = ["client_app", "server_app"]


def client_app(
    model_fn: Callable[[], Any],
    data_fn: Callable[[Any], Any],
    *,
    privacy: DPSGD | None = None,
    ledger: str | os.PathLike[str] | Callable[[Any], str | os.PathLike[str]] | None = None,
    strategy: Any = "auto",
) -> Any:
    """Makes the app of Flower's nodes: each is a client, which trains on its own rows.

    What a client does in a round comes from `server_app`. It is what `tfdist.fit` does with
    `federated=` and the same clients.

    Args:
        model_fn: Makes the model, compiled with the client's optimizer, loss and metrics. The
            server must use the same function.
        data_fn: Returns the rows of a node: x, (x, y) or (x, y, sample_weight), arrays, the
            same in each round. Its argument is Flower's `Context`: `node_config` and
            `run_config` say which node and run it is.
        privacy: A `tfdist.DPSGD` with a `noise_multiplier`, which protects each example of
            this client from the server and from other clients. The client then sends no
            metrics.
        ledger: With `privacy`: the file in which this node counts its private steps, over all
            rounds and runs, or a function of the `Context` that returns it.
        strategy: As in `fit`. Without `privacy`, a client trains on one device.

    Returns:
        Flower's `ClientApp`.

    Raises:
        MissingPackageError: Flower is not installed.
        ArgumentError: `privacy` cannot be used here.

    Example:
        >>> import tfdist.flower  # doctest: +SKIP
        >>> app = tfdist.flower.client_app(model_fn, data_fn)  # doctest: +SKIP
    """
    if privacy is None:
        if ledger is not None:
            raise ArgumentError(
                "`ledger` counts private steps. Received: a ledger, and privacy=None. Leave it "
                "out, or pass privacy=tfdist.DPSGD(...)."
            )
        return client.make_app(model_fn, data_fn, functools.partial(_train, strategy=strategy))
    if (
        not isinstance(privacy, DPSGD)
        or not privacy.samples
        or privacy.target_epsilon is not None
    ):
        raise ArgumentError(
            "On Flower, `privacy` must be a tfdist.DPSGD with a `noise_multiplier`: a client "
            "does not know the steps to come. Received: "
            f"privacy={privacy!r}. tfdist.privacy.noise_multiplier finds it for a target "
            "epsilon and all local steps of all rounds."
        )
    if ledger is None:
        raise ArgumentError(
            "With `privacy`, `ledger` must be a file that outlives the node: epsilon is of all "
            "rounds and runs. Received: ledger=None. Pass a path that no other node uses."
        )
    train = functools.partial(_train_privately, privacy, ledger, strategy)
    return client.make_app(model_fn, data_fn, train)


def server_app(
    model_fn: Callable[[], Any],
    *,
    federated: FedAvg,
    rounds: int,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    num_clients: int = 2,
    lost: str = "repeat",
    timeout: float = 3600.0,
    shuffle: bool = True,
    seed: int | None = None,
    callbacks: Any = None,
    validation_data: Any = None,
    verbose: Any = 2,
    on_end: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Makes the app of Flower's server: it makes the rounds of a `FedAvg` with all nodes.

    A round is an epoch of `fit`. Callbacks, `History`, `validation_data` and checkpoints are
    those of `fit`. Updates are summed in the order of the clients: by the `partition-id` of
    their nodes, or by the ids of the nodes if not all have one.

    Args:
        model_fn: Makes the model, as in `client_app`.
        federated: The settings, without `clients`: each node is a client.
        rounds: Number of rounds.
        checkpoint: As in `fit`. Another run goes on with the round, the server's optimizer and
            the model. It cannot be used with `keep_optimizer=True`.
        batch_size: Rows of a local step of a client; 32 if None.
        num_clients: The number of connected nodes for which the run waits.
        lost: "repeat": clients that do not answer, or answer with an error, are asked again, up
            to 3 times, and then the run ends. "skip": the round is made without them.
        timeout: Seconds to wait for nodes to connect, and for the answers of a round.
        shuffle: As in `fit`, for the rows of each client.
        seed: As in `fit`.
        callbacks: Keras callbacks, on the server.
        validation_data: As in `fit`, on the server.
        verbose: As in `fit`.
        on_end: Called with the trained model and Keras's `History`, to save or test the model.

    Returns:
        Flower's `ServerApp`.

    Raises:
        MissingPackageError: Flower is not installed.
        ArgumentError: An argument is not valid.

    Example:
        >>> import tfdist.flower  # doctest: +SKIP
        >>> app = tfdist.flower.server_app(  # doctest: +SKIP
        ...     model_fn, federated=tfdist.FedAvg(local_steps=8), rounds=20
        ... )
    """
    settings = ServerSettings(
        federated=federated,
        rounds=rounds,
        batch_size=32 if batch_size is None else batch_size,
        num_clients=num_clients,
        lost=lost,
        timeout=timeout,
        shuffle=shuffle,
        seed=seed,
        callbacks=callbacks,
        validation_data=validation_data,
        verbose=verbose,
        has_checkpoint=checkpoint is not None,
    )

    def continuation_of(strategy: Strategy, extensions: Sequence[Extension]) -> Continuation:
        if checkpoint is None:
            return Continuation(extensions)
        return CheckpointRun(checkpoint, strategy, extensions)

    app = messages.flower("serverapp").ServerApp()

    def main(grid: Any, context: Any) -> None:
        model, history = server.serve(grid, model_fn, settings, continuation_of)
        if on_end is not None:
            on_end(model, history)

    app.main()(main)
    return app


def _train(
    task: RoundTask, model: Any, given: Any, sent: Any, kept: Any, context: Any, strategy: Any
) -> client.LocalOutcome:
    return client.train(task, model, given, sent, kept, strategy)


def _train_privately(
    privacy: DPSGD,
    ledger: Any,
    strategy: Any,
    task: RoundTask,
    model: Any,
    given: Any,
    sent: Any,
    kept: Any,
    context: Any,
) -> client.LocalOutcome:
    """Makes the local steps of a round by a private `fit`, and counts them in the ledger."""
    settings = task.averaging()
    for name in ("proximal", "keep_optimizer"):
        if getattr(settings, name):
            raise ArgumentError(
                f"A client with `privacy` trains without `{name}`. Received: {name}="
                f"{getattr(settings, name)!r} of the server. Leave one of them out."
            )
    path = Path(os.fspath(ledger(context) if callable(ledger) else ledger)).expanduser()
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(given)
    session = current(strategy)
    request = replace(
        request_of(session, model, (x, y, sample_weight), task.batch_size, True, 0),
        sampler=Sequential(),
    )
    compose(model, "train_step", read(request)[0], session.strategy)
    state = state_of(model)
    client.set_values(state, sent)
    # Optimizers begin anew, and only schedules go on: a count would look like earlier steps.
    iterations = int(state.iterations[0].numpy())
    for variable in state.iterations:
        variable.assign(0)
    before = [variable.numpy() for variable in state.of_model]
    rows = task.sizes[task.client]
    steps = settings.steps_of(-(-rows // task.batch_size))
    before_first = tf.constant(iterations, tf.int64)
    with _locked(path), _keras.schedules_after(state.optimizers, before_first):
        earlier = _read(path)
        history = api.fit(
            model,
            x,
            y,
            batch_size=task.batch_size,
            steps_per_epoch=steps,
            sample_weight=sample_weight,
            verbose=0,
            strategy=strategy,
            privacy=replace(privacy, spent=privacy.spent.merged(earlier)),
        )
        # The weights leave this process only after their steps are on the disk.
        _write(path, history.privacy.ledger.merged(earlier))
    values = [variable.numpy() for variable in state.of_model]
    trained = len(state.trained)
    values[trained:] = before[trained:]  # the guarantee is of trained weights alone
    metrics = [_unknown(variable) for variable in state.metrics]
    return client.LocalOutcome(values, metrics, facts={"epsilon": history.privacy.epsilon})


def _unknown(variable: Any) -> Any:
    """Returns a state that tells nothing: the metrics of examples are not private."""
    value = np.zeros_like(variable.numpy())
    return np.full_like(value, np.nan) if value.dtype.kind == "f" else value


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Makes a context in which no other process uses the ledger: none forgets another's steps.

    Nodes that share a ledger wait for each other, and each counts the steps of all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Ledger:
    try:
        return Ledger.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return Ledger()
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "The ledger must be readable, or how many private steps were made is not known. "
            f"Received: {str(path)!r} ({error}). Pass another file, and what was spent as "
            "DPSGD(spent=...)."
        ) from None


def _write(path: Path, ledger: Ledger) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        json.dump(ledger.to_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
