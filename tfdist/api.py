"""`fit`, `evaluate` and `predict`: from arguments to Keras's own loop."""

from __future__ import annotations

import os
from typing import Any

from tfdist import data
from tfdist.compression.extension import CompressedTraining
from tfdist.compression.settings import PowerSGD
from tfdist.privacy import model_history
from tfdist.privacy.extension import PrivateTraining
from tfdist.privacy.settings import DPSGD
from tfdist.resume import elastic
from tfdist.resume.checkpoint import Checkpoint, CheckpointRun
from tfdist.samplers import Sampler
from tfdist.strategies.session import current
from tfdist.training import preflight
from tfdist.training.calls import watched
from tfdist.training.extension import Continuation, Extension
from tfdist.training.request import Request
from tfdist.training.run import Seeds, Training
from tfdist.training.verify import Verification


@watched
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
    class_weight: Any = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: Any = 1,
    *,
    strategy: Any = "auto",
    sampler: Sampler | None = None,
    augment: data.Augment | None = None,
    shard: Any = None,
    seed: int | None = None,
    privacy: DPSGD | None = None,
    compression: str | PowerSGD | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    verify_every: int | None = None,
    whole_batch: bool | None = None,
) -> Any:
    """Trains a Keras model on every replica there is, as one process would.

    The arguments are those of `keras.Model.fit` with their meaning there, and more by name.
    The weights afterwards equal those of one process with the same seed, up to the order of
    float additions, for every synchronous strategy and any number of replicas and examples;
    `docs/promise.md` has the limits. Sums over replicas are taken of gradients and of
    metrics' state, weighted by examples (Goyal et al., "Accurate, Large Minibatch SGD",
    2017, section 3, says why a mean of means is wrong).

    Args:
        model: A compiled `keras.Model`, or a function without arguments that returns one.
        x: Arrays of shape [examples, ...] (NumPy, TensorFlow, pandas, SciPy), nested in dicts,
            lists or tuples; or a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator
            of global batches `(x, y)` or `(x, y, sample_weight)`, the same on every worker;
            or a `tfdist.ByClass`, of which `sampler` draws examples.
        y: Targets, arrays of shape [examples, ...].
        batch_size: Examples of one update over all replicas; 32 if None.
        epochs: The epoch to train until.
        verbose: "auto", 0, 1 or 2; only the chief shows anything.
        callbacks: Keras callbacks. Those that write run on the chief.
        validation_split: Part of the arrays, from their end, to validate on.
        validation_data: What to validate on, of any kind that `x` may be.
        shuffle: Whether rows come in another order each epoch; "batch" keeps batches whole.
        class_weight: Weight of the loss by class number; or "balanced", "effective" or a
            `tfdist.imbalance.EffectiveNumber`, which find it from how often classes come.
        sample_weight: Weight of the loss by example, shape [examples] or more.
        initial_epoch: The epoch to start at.
        steps_per_epoch: Updates in an epoch, if not the whole data.
        validation_steps: Batches to validate on, if not all.
        validation_batch_size: As `batch_size`, for validation.
        validation_freq: Epochs between validations, or a list of epochs.
        strategy: "auto", "single", "mirrored", "multi_worker", "horovod",
            "parameter_server", "tpu", or an instance of `tf.distribute.Strategy`,
            `tfdist.Horovod` or `tfdist.ParameterServer`.
        sampler: Which rows make up each step; overrides `shuffle`.
        augment: Changes training examples at random, with Keras's preprocessing layers.
        shard: None if every worker passes the same data. "local", or a `tfdist.LocalShard`, if
            each passes the arrays that it holds, of any number of rows, also to validate on;
            the union of all is trained on, and no row leaves its worker.
        seed: Of sampler and augmentation; `init`'s if None, and drawn if that is None too.
            In private training `init`'s is not used.
        privacy: A `tfdist.DPSGD` or `tfdist.DPFTRL` for differentially private training.
        compression: "bf16" or "fp16" for gradients that travel in half the bytes, or a
            `tfdist.PowerSGD` for far fewer. None: as the strategy says, else none.
        checkpoint: A `tfdist.Checkpoint`, or a directory, from which training goes on as if it
            had never stopped, and in which it is saved.
        verify_every: Steps after which all replicas' weights are compared, again and again,
            and at the end; only at the end if None, never if 0.
        whole_batch: Whether every replica computes the whole batch, which gives the weights of
            one process whatever a step does, and is no faster. None: where a step's outcome is
            found to be no mean over rows, such as a sum or what batches in a row share.

    Returns:
        Keras's `History`, the same on every worker; in private training its attribute
        `privacy` is a `tfdist.privacy.Report`.

    Raises:
        ArgumentError: Arguments or data cannot be used as they are.
        StrategyError: The strategy cannot run here.
        DisagreementError: The workers were called differently, or replicas differ.
        CheckpointError: A checkpoint could not be written, or none could be read.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
        >>> history = tfdist.fit(model, x, y, batch_size=4, epochs=2, verbose=0)
        >>> len(history.history["loss"])
        2
    """
    preflight.check_counts(epochs=epochs, initial_epoch=initial_epoch)
    preflight.check_steps(steps_per_epoch=steps_per_epoch, validation_steps=validation_steps)
    session, model = current(strategy), preflight.compiled(model)
    model_history.check_idle(model)
    request = Request(
        session=session,
        model=model,
        x=x,
        y=y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        epochs=epochs,
        initial_epoch=initial_epoch,
        verbose=verbose,
        callbacks=callbacks,
        validation_split=validation_split if validation_data is None else 0.0,
        validation_data=validation_data,
        validation_steps=validation_steps,
        validation_batch_size=validation_batch_size,
        validation_freq=validation_freq,
        shuffle=shuffle,
        class_weight=class_weight,
        steps_per_epoch=steps_per_epoch,
        sampler=sampler,
        augment=augment,
        shard=shard,
        seed=seed,
        whole_batch=whole_batch,
        is_seeded=seed is not None or session.seed is not None,
    )
    extensions: list[Extension] = [Verification(verify_every)]
    if privacy is not None:
        extensions.append(PrivateTraining(privacy))
    extensions.append(CompressedTraining(compression or session.strategy.compression))
    continuation = Continuation(extensions)
    if checkpoint is not None:
        continuation = CheckpointRun(checkpoint, session.strategy, extensions)
    elif session.strategy.elastic:
        continuation = elastic.ElasticRun(session.strategy, extensions)
    return Training(request, [*extensions, Seeds(), continuation], continuation).run()
