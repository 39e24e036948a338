"""`fit`, `evaluate` and `predict`: from arguments to Keras's own loop."""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras, data
from tfdist import callbacks as tfdist_callbacks
from tfdist._version import __version__
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.samplers import Sampler, Sequential, from_shuffle
from tfdist.session import Session, current
from tfdist.steps import Functions, Stop, make_functions
from tfdist.strategies.base import Strategy

_MEMORY = "_tfdist_prepared"


def fit(
    model: Any,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: Any = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool | str = True,
    class_weight: dict[int, float] | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: Any = 1,
    *,
    strategy: Any = "auto",
    sampler: Sampler | None = None,
    seed: int | None = None,
) -> Any:
    """Trains a Keras model on every replica there is, as one process would.

    The arguments are those of `keras.Model.fit` with their meaning there, and three more.
    The weights afterwards equal those of one process with the same seed, up to the order of
    float additions, for every synchronous strategy and any number of replicas and examples;
    `docs/promise.md` has the limits. Sums over replicas are taken of gradients and of
    metrics' state, weighted by examples (Goyal et al., "Accurate, Large Minibatch SGD",
    2017, section 3, says why a mean of means is wrong).

    Args:
        model: A compiled `keras.Model`, or a function without arguments that returns one.
        x: Arrays of shape [examples, ...] (NumPy, TensorFlow, pandas), nested in dicts,
            lists or tuples; or a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator
            of global batches `(x, y)` or `(x, y, sample_weight)`, the same on every worker.
        y: Targets, arrays of shape [examples, ...].
        batch_size: Examples of one update over all replicas; 32 if None.
        epochs: The epoch to train until.
        verbose: "auto", 0, 1 or 2; only the chief shows anything.
        callbacks: Keras callbacks. Those that write run on the chief.
        validation_split: Part of the arrays, from their end, to validate on.
        validation_data: What to validate on, of any kind that `x` may be.
        shuffle: Whether rows come in another order each epoch; "batch" keeps batches whole.
        class_weight: Weight of the loss by class number.
        sample_weight: Weight of the loss by example, shape [examples] or more.
        initial_epoch: The epoch to start at.
        steps_per_epoch: Updates in an epoch, if not the whole data.
        validation_steps: Batches to validate on, if not all.
        validation_batch_size: As `batch_size`, for validation.
        validation_freq: Epochs between validations, or a list of epochs.
        strategy: "auto", "single", "mirrored", "multi_worker", "tpu", or a
            `tf.distribute.Strategy` instance.
        sampler: Which rows make up each step; overrides `shuffle`.
        seed: Of the sampler; `init`'s if None, and drawn if that is None too.

    Returns:
        Keras's `History`, the same on every worker.

    Raises:
        ArgumentError: Arguments or data cannot be used as they are.
        StrategyError: The strategy cannot run here.
        DisagreementError: The workers were called differently.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
        >>> history = tfdist.fit(model, x, y, batch_size=4, epochs=2, verbose=0)
        >>> len(history.history["loss"])
        2
    """
    session = current(strategy)
    _check_counts(epochs=epochs, initial_epoch=initial_epoch)
    _check_steps(steps_per_epoch=steps_per_epoch, validation_steps=validation_steps)
    seed = session.sampler_seed(seed)
    model = _compiled(model)
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = data.split(
            x, y, sample_weight, validation_split
        )
    source = data.read(
        x,
        y,
        sample_weight,
        data.Settings(
            batch_size=batch_size,
            steps=steps_per_epoch,
            sampler=sampler or from_shuffle(shuffle),
            shuffle=bool(shuffle),
            seed=seed,
            training=True,
            class_weight=class_weight,
        ),
    )
    validation = None
    if validation_data is not None:
        validation = _read_in_order(
            *keras.utils.unpack_x_y_sample_weight(validation_data),
            batch_size=validation_batch_size
            or (batch_size if data.is_arrays(_first(validation_data)) else None),
            steps=validation_steps,
        )
    _keras.build(model, source.spec())
    prepared = _prepare(model, session)
    _check_agreement(
        session,
        model,
        {
            "batch_size": batch_size,
            "epochs": epochs,
            "initial_epoch": initial_epoch,
            "steps_per_epoch": source.steps,
            "validation steps": validation and validation.steps,
            "steps_per_execution": model.steps_per_execution,
        },
        source,
    )
    announced = getattr(source, "batch_size", None)
    _announce(session, verbose, announced)
    stream = data.Stream(source, session.strategy, lambda: _epochs_done(model, source))
    with prepared.running(), _quiet_stop(prepared.stop):
        return _keras.FIT(
            model,
            _keras.StreamAdapter(stream, source.steps, source.on_epoch_end),
            epochs=epochs,
            verbose=verbose if session.is_chief else 0,
            callbacks=tfdist_callbacks.prepare(
                callbacks, session.strategy, prepared.stop, prepared.variables
            ),
            validation_data=validation and _adapt(validation, session.strategy),
            shuffle=False,
            initial_epoch=initial_epoch,
            validation_freq=validation_freq,
        )


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
    _check_steps(steps=steps)
    model = _compiled(model)
    source = _read_in_order(x, y, sample_weight, batch_size=batch_size, steps=steps)
    _keras.build(model, source.spec())
    prepared = _prepare(model, session)
    asked = {"batch_size": batch_size, "steps": source.steps}
    _check_agreement(session, model, asked, source)
    with prepared.running():
        return _keras.EVALUATE(
            model,
            _adapt(source, session.strategy),
            verbose=verbose if session.is_chief else 0,
            callbacks=callbacks,
            return_dict=return_dict,
        )


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
    _check_steps(steps=steps)
    model = model if isinstance(model, keras.Model) else model()
    source = _read_in_order(x, None, None, batch_size=batch_size, steps=steps)
    _keras.build_layers(model, source.spec())
    prepared = _prepare(model, session)
    asked = {"batch_size": batch_size, "steps": source.steps}
    _check_agreement(session, model, asked, source)
    with prepared.running():
        return _keras.PREDICT(
            model,
            _adapt(source, session.strategy),
            verbose=verbose if session.is_chief else 0,
            callbacks=callbacks,
        )


# --- the model ------------------------------------------------------------------------


@dataclass
class _Prepared:
    """A model's functions on a strategy, kept with it so that they are traced once."""

    model: Any
    strategy: Strategy
    compiled_state: tuple[Any, ...]
    variables: list[Any]
    held: contextlib.AbstractContextManager[None]
    functions: Functions
    stop: Stop

    def fits(self, model: Any, strategy: Strategy) -> bool:
        """Tells whether the model was compiled or rebuilt since, or moved elsewhere."""
        state = _keras.compiled_state(model)
        return (
            self.strategy is strategy
            and len(state) == len(self.compiled_state)
            and all(a is b for a, b in zip(state, self.compiled_state, strict=True))
            and [id(v) for v in self.variables] == [id(v) for v in _variables(model)]
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Lets Keras's loop run the functions, and gives a plain model back."""
        self.stop.requested = self.stop.agreed = False
        functions = _keras.loop_functions(
            self.model,
            (data.Epoch, data.Share),
            train_function=self.functions.train,
            test_function=self.functions.test,
            predict_function=self.functions.predict,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.held)
            stack.enter_context(functions)
            if self.strategy.place.num_replicas > 1:
                stack.enter_context(_keras.replicated(self.model))
            yield


def _compiled(model: Any) -> Any:
    made = model if isinstance(model, keras.Model) or not callable(model) else model()
    if not isinstance(made, keras.Model):
        raise ArgumentError(
            "`model` must be a compiled keras.Model or a function that returns one. "
            f"Received: model={made!r}."
        )
    if not made.compiled:
        raise ArgumentError(
            "`model` must be compiled. Received: a model without optimizer and loss. "
            "Call model.compile(optimizer=..., loss=...) first."
        )
    return made


def _prepare(model: Any, session: Session) -> _Prepared:
    known = vars(model).get(_MEMORY)
    if known is not None and known.fits(model, session.strategy):
        return known  # type: ignore[no-any-return]
    variables = _variables(model)
    stop = Stop()
    prepared = _Prepared(
        model,
        session.strategy,
        _keras.compiled_state(model),
        variables,
        session.strategy.hold(variables, _keras.optimizers_of(model)),
        make_functions(model, session.strategy, stop),
        stop,
    )
    vars(model)[_MEMORY] = prepared
    return prepared


def _variables(model: Any) -> list[Any]:
    """Lists all state of a model: weights, seeds, optimizers', metrics'; each once."""
    parts = [model.variables, *(o.variables for o in _keras.optimizers_of(model))]
    if model.compiled:
        parts.append(_keras.metric_variables(model))
    return list({id(v): v for part in parts for v in part}.values())


def _epochs_done(model: Any, source: data.Source) -> int:
    """Counts the epochs that the optimizer has behind it, so that data goes on after them."""
    if model.optimizer is None or not source.steps:
        return 0
    return -(-int(model.optimizer.iterations.numpy()) // source.steps)


# --- arguments ------------------------------------------------------------------------


def _first(validation_data: Any) -> Any:
    return keras.utils.unpack_x_y_sample_weight(validation_data)[0]


def _read_in_order(
    x: Any, y: Any, sample_weight: Any, *, batch_size: int | None, steps: int | None
) -> data.Source:
    settings = data.Settings(
        batch_size, steps, Sequential(), shuffle=False, seed=0, training=False
    )
    return data.read(x, y, sample_weight, settings)


def _adapt(source: data.Source, strategy: Strategy) -> Any:
    stream = data.Stream(source, strategy)
    return _keras.StreamAdapter(stream, source.steps, source.on_epoch_end)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 0:
            raise ArgumentError(
                f"`{name}` must be a whole number, 0 or more. Received: {name}={value!r}."
            )


def _check_steps(**steps: Any) -> None:
    for name, value in steps.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(
                f"`{name}` must be a whole number of at least 1, or None for all of the data. "
                f"Received: {name}={value!r}."
            )


def _check_agreement(
    session: Session, model: Any, asked: dict[str, Any], source: data.Source
) -> None:
    """Compares what the workers were asked to do, before any of it is done."""
    if session.strategy.place.num_workers == 1:
        return
    mine = {
        "versions": f"tfdist {__version__}, keras {keras.__version__}, tensorflow "
        f"{tf.__version__}, python {platform.python_version()}",
        "model": [f"{v.path} {tuple(v.shape)} {v.dtype}" for v in model.variables],
        "data": source.fingerprint(),
        **asked,
    }
    everyone = session.strategy.gather_objects(mine)
    for name in dict.fromkeys(key for facts in everyone for key in facts):
        values = [facts.get(name) for facts in everyone]
        if any(value != values[0] for value in values):
            _raise_disagreement(name, values)


def _raise_disagreement(name: str, values: list[Any]) -> None:
    if isinstance(values[0], list):  # of a model's variables, only what differs
        common = set.intersection(*(set(value or []) for value in values))
        values = [[line for line in value or [] if line not in common] for value in values]
    listed = "; ".join(f"worker {i}: {value}" for i, value in enumerate(values))
    remedy = {
        "data": "Give every worker the same data in the same order.",
        "versions": "Install the same versions on every host.",
    }.get(name, "Start the same script with the same arguments on every worker.")
    raise DisagreementError(
        f"All workers must be given the same {name}. Received: {listed}. {remedy}"
    )


def _announce(session: Session, verbose: Any, batch_size: int | None) -> None:
    if session.is_chief and verbose != 0:
        print(session.describe(batch_size), flush=True)


@contextlib.contextmanager
def _quiet_stop(stop: Stop) -> Iterator[None]:
    """Keeps Keras from calling an agreed stop an input that ran out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield
