"""`evaluate` and `predict`."""

from __future__ import annotations

from typing import Any

import keras

from tfdist import _keras, data
from tfdist.step.prepared import prepare
from tfdist.strategies.session import current
from tfdist.training import preflight
from tfdist.training.calls import watched
from tfdist.training.sources import adapted, composed, read_in_order


@watched
def evaluate(
    model: Any,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    verbose: Any = "auto",
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
    *,
    strategy: Any = "auto",
    shard: Any = None,
) -> Any:
    """Computes loss and metrics, every example counted once, on every replica there is.

    Args:
        model: A compiled `keras.Model`, or a function that returns one.
        x: As in `fit`.
        y: As in `fit`.
        batch_size: Examples of one step over all replicas; 32 if None.
        verbose: "auto", 0, 1 or 2; only the chief shows anything.
        sample_weight: As in `fit`.
        steps: Batches to evaluate, if not all.
        callbacks: Keras callbacks.
        return_dict: Whether to return a dict by metric name rather than a list.
        strategy: As in `fit`.
        shard: As in `fit`.

    Returns:
        What `keras.Model.evaluate` returns, the same on every worker.

    Raises:
        ArgumentError: Arguments or data cannot be used as they are.
        StrategyError: The strategy cannot run here.
        DisagreementError: The workers were called differently.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> x, y = np.ones((5, 4), "float32"), np.ones((5, 1), "float32")
        >>> sorted(tfdist.evaluate(model, x, y, verbose=0, return_dict=True))
        ['loss']
    """
    session = current(strategy)
    preflight.check_steps(steps=steps)
    model = preflight.compiled(model)
    source = read_in_order(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps=steps,
        shard=data.local_shard(shard, session.strategy),
        strategy=session.strategy,
    )
    preflight.check_batched(model, x, source.spec())
    used = composed(model, "test_step", source, session.strategy)
    prepared = prepare(model, used)
    preflight.check_agreement(
        session, model, {"batch_size": batch_size, "steps": source.steps}, source
    )
    with prepared.running(source):
        return _keras.EVALUATE(
            model,
            adapted(source, used),
            verbose=verbose if session.is_chief else 0,
            callbacks=callbacks,
            return_dict=return_dict,
        )


@watched
def predict(
    model: Any,
    x: Any,
    batch_size: int | None = None,
    verbose: Any = "auto",
    steps: int | None = None,
    callbacks: Any = None,
    *,
    strategy: Any = "auto",
) -> Any:
    """Computes the model's outputs, in the order of the input, on every replica there is.

    Args:
        model: A `keras.Model`, or a function that returns one.
        x: As in `fit`.
        batch_size: Examples of one step over all replicas; 32 if None.
        verbose: "auto", 0, 1 or 2; only the chief shows anything.
        steps: Batches to predict, if not all.
        callbacks: Keras callbacks.
        strategy: As in `fit`.

    Returns:
        NumPy arrays of shape [examples, ...], all of them on every worker.

    Raises:
        ArgumentError: Arguments or data cannot be used as they are.
        StrategyError: The strategy cannot run here.
        DisagreementError: The workers were called differently.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> tfdist.predict(model, np.ones((5, 4), "float32"), verbose=0).shape
        (5, 1)
    """
    session = current(strategy)
    preflight.check_steps(steps=steps)
    model = model if isinstance(model, keras.Model) else model()
    source = read_in_order(
        x, None, None, batch_size=batch_size, steps=steps, strategy=session.strategy
    )
    preflight.check_batched(model, x, source.spec())
    used = composed(model, "predict_step", source, session.strategy)
    prepared = prepare(model, used)
    preflight.check_agreement(
        session, model, {"batch_size": batch_size, "steps": source.steps}, source
    )
    with prepared.running(source):
        return _keras.PREDICT(
            model,
            adapted(source, used, by_number=False),
            verbose=verbose if session.is_chief else 0,
            callbacks=callbacks,
        )
