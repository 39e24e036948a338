"""`evaluate` and `predict`."""

from __future__ import annotations

from typing import Any

import keras

from tfdist import _keras, data
from tfdist.step.prepared import PreparedModel, prepare
from tfdist.strategies.base import Strategy
from tfdist.strategies.session import Session, current
from tfdist.training import preflight
from tfdist.training.calls import watched
from tfdist.training.sources import keras_adapter, read_in_order, strategy_for_steps


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
    """Computes loss and metrics on all replicas. Every example counts once.

    Args:
        model: A compiled `keras.Model`, or a function that returns one.
        x: As in `fit`.
        y: As in `fit`.
        batch_size: Number of examples of one step over all replicas; 32 if None.
        verbose: "auto", 0, 1 or 2. Only the chief shows progress.
        sample_weight: As in `fit`.
        steps: Number of batches to evaluate; all if None.
        callbacks: Keras callbacks.
        return_dict: Whether to return a dict by metric name rather than a list.
        strategy: As in `fit`.
        shard: As in `fit`.

    Returns:
        The result of `keras.Model.evaluate`, the same on every worker.

    Raises:
        ArgumentError: An argument or the data is invalid.
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
    model = preflight.compiled_model(model)
    source = read_in_order(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps=steps,
        shard=data.local_shard(shard, session.strategy),
        strategy=session.strategy,
    )
    prepared, step_strategy = _prepared(model, "test_step", x, source, session, batch_size)
    with prepared.running(source):
        return _keras.EVALUATE(
            model,
            keras_adapter(source, step_strategy),
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
    """Computes the model's outputs on all replicas, in the order of the input.

    Args:
        model: A `keras.Model`, or a function that returns one.
        x: As in `fit`.
        batch_size: Number of examples of one step over all replicas; 32 if None.
        verbose: "auto", 0, 1 or 2. Only the chief shows progress.
        steps: Number of batches to predict; all if None.
        callbacks: Keras callbacks.
        strategy: As in `fit`.

    Returns:
        NumPy arrays of shape [examples, ...], complete on every worker.

    Raises:
        ArgumentError: An argument or the data is invalid.
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
    prepared, step_strategy = _prepared(model, "predict_step", x, source, session, batch_size)
    with prepared.running(source):
        return _keras.PREDICT(
            model,
            keras_adapter(source, step_strategy, by_number=False),
            verbose=verbose if session.is_chief else 0,
            callbacks=callbacks,
        )


def _prepared(
    model: Any, step: str, x: Any, source: data.Source, session: Session, batch_size: int | None
) -> tuple[PreparedModel, Strategy]:
    """Makes a model ready for a loop without training, and compares the workers' calls.

    Args:
        model: The model.
        step: The name of its method that makes a step.
        x: The data, as in the call.
        source: The data.
        session: The strategy, and the seed.
        batch_size: As in the call.

    Returns:
        The model, and the strategy of its steps.
    """
    preflight.check_batched(model, x, source.spec())
    strategy = strategy_for_steps(model, step, source, session.strategy)
    prepared = prepare(model, strategy)
    arguments = {"batch_size": batch_size, "steps": source.steps}
    preflight.check_agreement(session, model, arguments, source)
    return prepared, strategy
