"""What is trained or evaluated on, and how replicas compute a batch of it."""

from __future__ import annotations

from typing import Any

import keras

from tfdist import _keras, data
from tfdist.samplers import Sequential, Uniform
from tfdist.step.composition import compose
from tfdist.strategies.base import Strategy
from tfdist.training import preflight
from tfdist.training.request import Request


def read(request: Request) -> tuple[data.Source, data.Source | None]:
    """Gives what to train on and what to validate on, neither of which is read yet."""
    strategy = request.session.strategy
    shard = data.local_shard(request.shard, strategy)
    columns = request.x, request.y, request.sample_weight
    to_validate = request.validation_data
    if request.validation_split and to_validate is None:
        columns, to_validate = data.split(
            *columns, request.validation_split, may_be_empty=shard is not None
        )
    assert request.sampler is not None
    assert request.seed is not None
    source = data.read(
        *columns,
        data.SourceSettings(
            batch_size=request.batch_size,
            steps=request.steps_per_epoch,
            sampler=request.sampler,
            shuffle=bool(request.shuffle),
            seed=request.seed,
            training=True,
            class_weight=request.class_weight,
            augment=request.augment,
            shard=shard,
            strategy=strategy,
            private=request.is_private,
            copies=request.copies,
        ),
    )
    preflight.check_batched(request.model, columns[0], source.spec())
    if to_validate is None:
        return source, None
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(to_validate)
    validation = read_in_order(
        x,
        y,
        sample_weight,
        batch_size=request.validation_batch_size
        or (request.batch_size if data.is_arrays(x) else None),
        steps=request.validation_steps,
        shard=shard,
        strategy=strategy,
    )
    preflight.check_batched(request.model, x, validation.spec())
    return source, validation


def read_in_order(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    steps: int | None,
    shard: data.LocalShard | None = None,
    strategy: Strategy | None = None,
) -> data.Source:
    """Gives data of which each row is used once, as `evaluate` and `predict` do.

    Args:
        x: As in `fit`.
        y: As in `fit`.
        sample_weight: As in `fit`.
        batch_size: Examples of one step over all replicas; 32 if None.
        steps: Batches, if not all.
        shard: What this worker holds, if not everything.
        strategy: Where the replicas are.
    """
    # In order, all rows of a batch would be one worker's.
    sampler = Sequential() if shard is None else Uniform()
    settings = data.SourceSettings(
        batch_size,
        steps,
        sampler,
        shuffle=False,
        seed=0,
        training=False,
        shard=shard,
        strategy=strategy,
    )
    return data.read(x, y, sample_weight, settings)


def composed(
    model: Any,
    kind: str,
    source: data.Source,
    strategy: Strategy,
    whole_batch: bool | None = None,
    needs_state: bool = False,
) -> Strategy:
    """Builds a model where Keras's own loop must not, and chooses how a batch is computed.

    Args:
        model: A compiled `keras.Model`.
        kind: "train_step" or "test_step".
        source: The data.
        strategy: Where the replicas are.
        whole_batch: As in `fit`.
        needs_state: Whether all of its variables must be there before it trains.

    Returns:
        What computes it: the strategy, or one of whole batches.
    """
    # XLA compiles no step in which variables are made.
    if not needs_state and not model.jit_compile and not has_replicas(strategy, source):
        if kind != "predict_step" and not _keras.has_own(model, kind):
            _keras.build_from_shapes(model, source.spec())
        return strategy
    return compose(model, kind, source, strategy, whole_batch)


def has_replicas(strategy: Strategy, source: data.Source) -> bool:
    """Tells whether a model's variables are more than those of one plain Keras process.

    Args:
        strategy: Where the replicas are.
        source: The data.
    """
    return not strategy.is_plain or source.may_be_empty


def adapted(source: data.Source, strategy: Strategy, by_number: bool = True) -> Any:
    """Gives data as Keras's loop takes it.

    Args:
        source: The data.
        strategy: Deals shares out to replicas.
        by_number: As in `data.Stream`.
    """
    stream = data.Stream(source, strategy, by_number=by_number)
    return _keras.StreamAdapter(stream, source.steps, stream.on_epoch_end)
