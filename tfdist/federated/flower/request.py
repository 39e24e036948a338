"""The arguments of the `fit` that a side of Flower makes."""

from __future__ import annotations

from typing import Any

from tfdist.training.request import Request


def request_of(
    session: Any, model: Any, columns: Any, batch_size: int, shuffle: Any, seed: int | None
) -> Request:
    """Makes the arguments of a `fit` of one epoch.

    Args:
        session: The session.
        model: A compiled `keras.Model`.
        columns: x, y and the weights of examples.
        batch_size: Rows of a local step.
        shuffle: As in `fit`.
        seed: The seed of the training, or None.
    """
    return Request(
        session=session,
        model=model,
        x=columns[0],
        y=columns[1],
        sample_weight=columns[2],
        batch_size=batch_size,
        epochs=1,
        initial_epoch=0,
        verbose=0,
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
        shuffle=shuffle,
        class_weight=None,
        steps_per_epoch=None,
        sampler=None,
        augment=None,
        shard=None,
        seed=seed,
        whole_batch=None,
    )
