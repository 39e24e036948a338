"""Sharded optimizer state and weights as a part of `fit`."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.sharding.exchange import ShardedExchange
from tfdist.sharding.updates import ShardedUpdates
from tfdist.step.prepared import PreparedModel
from tfdist.strategies.base import Strategy
from tfdist.strategies.model_parallel import ModelParallel
from tfdist.strategies.zero import Zero
from tfdist.training.callback_kinds import (
    backs_up,
    keeps_weights,
    listed,
    saves_between_steps,
    saves_model,
    shows_weights,
    swaps_weights,
)
from tfdist.training.extension import Extension
from tfdist.training.request import Request


class ShardedOptimizer(Extension):
    """Keeps the optimizer's state in parts, and with stage 3 the weights.

    Args:
        zero: The user's settings.
        compression: The compression of gradients, or None.
    """

    needs_state = True

    def __init__(self, zero: Zero | ModelParallel, compression: Any) -> None:
        self._zero = zero
        self._compression = compression
        self._saves = False
        self.exchange_maker = ShardedUpdates.of(zero)

    def choose(self, request: Request) -> Request:
        """Refuses what cannot be exact with parts.

        Raises:
            ArgumentError: A strategy, a callback or another argument.
        """
        _check_strategy(request.session.strategy, self._zero)
        if self._compression is not None:
            raise ArgumentError(
                "`Zero` sends gradients as they are. Received: strategy="
                f"{self._zero!r} with compression={self._compression!r}. Leave one of them out."
            )
        if request.is_private and self._zero.stage == 3:
            raise ArgumentError(
                "Private training needs whole weights. Received: privacy with "
                f"strategy={self._zero!r}. Use tfdist.Zero(stage=1)."
            )
        if request.model.run_eagerly and request.session.strategy.place.num_replicas > 1:
            raise ArgumentError(
                "`Zero` needs steps that are traced. Received: a model that was compiled with "
                "run_eagerly=True. Compile it without."
            )
        callbacks = listed(request.callbacks)
        for callback in callbacks:
            _check_callback(callback)
            if self._zero.stage == 3 and request.session.strategy.place.num_workers > 1:
                _check_reader(callback)
        self._saves = any(saves_model(c) or shows_weights(c) for c in callbacks)
        return request

    def around(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Lets the optimizer be built without memory for its state, if it will be in parts."""
        if request.session.strategy.place.num_replicas == 1:
            return contextlib.nullcontext()
        return _keras.built_unfilled(_keras.optimizers_of(request.model))

    def facts(self) -> dict[str, Any]:
        """Returns the settings, and whether a callback saves the optimizer."""
        return {"zero": self.exchange_maker, "saving callbacks": self._saves}

    def notice(self, request: Request) -> str | None:
        """Says in how many parts the optimizer's state is, and how large one is."""
        exchange = _exchange_of(request.model)
        what = "the optimizer's state" if self._zero.stage == 1 else "the training's state"
        if exchange is None:
            return f"{what} is whole: there is one replica"
        if not exchange.parts:
            return f"{what} is whole: it has nothing that is large enough to cut"
        count = request.session.strategy.place.num_replicas
        of_state, of_weights = exchange.part_bytes
        sizes = [f"weights in {count} parts of {_size(of_weights)}"] if of_weights else []
        if exchange.division.cuts:
            layers = len(exchange.division.plan.layers)
            axis = getattr(self._zero, "model_axis", "")
            ways = exchange.division.links.ways
            sizes.append(f"{layers} layers computed by {ways} replicas along {axis!r}")
        if of_state:
            sizes.append(f"optimizer state in {count} parts of {_size(of_state)}")
        return ", ".join(sizes)

    def callbacks(self, request: Request, callbacks: Any, prepared: PreparedModel) -> Any:
        """Gathers the state at the end of each epoch, if a callback on the chief saves it."""
        exchange = _exchange_of(request.model)
        if exchange is None:  # each replica computes whole batches
            for optimizer in _keras.optimizers_of(request.model):
                for variable in optimizer.variables:
                    _keras.fill(variable)
        has_others = request.session.strategy.place.num_workers > 1
        if exchange is None or not self._saves or not has_others:
            return callbacks
        first = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: exchange.slots.collect()
        )
        last = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: exchange.slots.drop_collected()
        )
        return _keras.around(callbacks, first=[first], last=[last])


def _size(count: int) -> str:
    """Formats a number of bytes.

    Example:
        >>> _size(200_000_000), _size(6144)
        ('191 MiB', '6 KiB')
    """
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"


def _exchange_of(model: Any) -> ShardedExchange | None:
    prepared = _keras.attached(model).prepared
    exchange = None if prepared is None else prepared.exchange
    return exchange if isinstance(exchange, ShardedExchange) else None


def _check_strategy(strategy: Strategy, zero: Zero | ModelParallel) -> None:
    why = None
    if not strategy.synchronous or strategy.has_servers:
        why = "whose optimizer state is on servers already"
    elif strategy.elastic:
        why = "whose processes may leave with their parts"
    elif not strategy.exchanges_parts:
        why = "which has no collectives of its kind"
    elif not strategy.sums_exactly or strategy.predivide != 1.0:
        why = "which does not sum gradients as they are"
    if why is not None:
        raise ArgumentError(
            "`Zero` needs mirrored, multi_worker or horovod, with exact sums of gradients. "
            f"Received: {zero!r} on {strategy.name}, {why}. Leave `Zero` out."
        )


def _check_reader(callback: Any) -> None:
    """Refuses a callback that keeps all weights on each process."""
    if keeps_weights(callback):
        raise ArgumentError(
            "With `Zero(stage=3)` on several processes, a callback must not keep all weights. "
            "Received: EarlyStopping(restore_best_weights=True). Use a ModelCheckpoint with "
            "save_best_only=True, and load what it saved."
        )


def _check_callback(callback: Any) -> None:
    if backs_up(callback) or swaps_weights(callback):
        what, remedy = "reads and writes the optimizer's state", "pass `checkpoint=` to fit"
        if swaps_weights(callback):
            remedy = "use the optimizer's ema_overwrite_frequency"
    elif saves_between_steps(callback):
        what, remedy = "saves between steps", "let it save at the end of each epoch"
    else:
        return
    raise ArgumentError(
        "With `Zero`, a callback must not need the whole state of the optimizer between steps. "
        f"Received: {type(callback).__name__}, which {what}. Instead {remedy}, or leave `Zero` "
        "out."
    )
