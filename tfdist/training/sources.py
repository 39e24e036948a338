"""The data of a training or evaluation, and how replicas compute its batches."""

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
    """Makes the sources of training and validation data. It does not read the data yet."""
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
    """Makes a source that uses each row once, as `evaluate` and `predict` do.

    Args:
        x: As in `fit`.
        y: As in `fit`.
        sample_weight: As in `fit`.
        batch_size: Number of examples of one step over all replicas; 32 if None.
        steps: Number of batches; all if None.
        shard: This worker's shard of the data, if the data is sharded.
        strategy: The strategy.
    """
    # With shards in sequence, all rows of a batch would come from one worker.
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


def strategy_for_steps(
    model: Any,
    kind: str,
    source: data.Source,
    strategy: Strategy,
    whole_batch: bool | None = None,
    needs_state: bool = False,
) -> Strategy:
    """Chooses the strategy that computes the steps. Builds the model if it must.

    Args:
        model: A compiled `keras.Model`.
        kind: "train_step", "test_step" or "predict_step".
        source: The data.
        strategy: The strategy of the session.
        whole_batch: As in `fit`.
        needs_state: Whether the model must have all its variables before training begins.

    Returns:
        The strategy, or a `Whole` if replicas cannot split the batches.
    """
    # Keras's own loop may build the model in its first step, except where replicas need the
    # variables earlier. With `jit_compile` too: XLA compiles no step that creates variables.
    if not needs_state and not model.jit_compile and not has_replicas(strategy, source):
        if kind != "predict_step" and not _keras.has_own(model, kind):
            _keras.build_from_shapes(model, source.spec())
        return strategy
    return compose(model, kind, source, strategy, whole_batch)


def has_replicas(strategy: Strategy, source: data.Source) -> bool:
    """Returns whether steps need more than the variables of a plain Keras process.

    Args:
        strategy: The strategy.
        source: The data.
    """
    return not strategy.is_plain or source.may_be_empty


def keras_adapter(source: data.Source, strategy: Strategy, by_number: bool = True) -> Any:
    """Makes the data adapter for Keras's loop.

    Args:
        source: The data.
        strategy: Distributes batches to replicas.
        by_number: As in `data.Stream`.
    """
    stream = data.Stream(source, strategy, by_number=by_number)
    return _keras.StreamAdapter(stream, source.steps, stream.on_epoch_end)
