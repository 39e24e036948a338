"""`fit`: from its arguments to Keras's own training loop."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from tfdist import data
from tfdist.compression.extension import CompressedTraining
from tfdist.compression.settings import PowerSGD
from tfdist.federated.extension import FederatedTraining
from tfdist.federated.protection import ExampleProtection
from tfdist.federated.settings import FedAvg, check
from tfdist.privacy import model_history
from tfdist.privacy.client_extension import ClientPrivacy
from tfdist.privacy.extension import PrivateTraining
from tfdist.privacy.settings import DPSGD
from tfdist.privacy.silo_extension import SiloPrivacy
from tfdist.resume import elastic
from tfdist.resume.checkpoint import Checkpoint, CheckpointRun
from tfdist.samplers import Sampler
from tfdist.sharding.extension import ShardedOptimizer
from tfdist.sharding.pipeline.extension import PipelinedTraining
from tfdist.strategies.session import current
from tfdist.training import preflight
from tfdist.training.calls import watched
from tfdist.training.extension import Continuation, Extension
from tfdist.training.request import Request
from tfdist.training.run import Seeds, Training
from tfdist.training.verification import Verification


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
    federated: FedAvg | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    verify_every: int | None = None,
    whole_batch: bool | None = None,
) -> Any:
    """Trains a Keras model on all replicas, with the result of one process.

    The arguments are those of `keras.Model.fit`, with the same meaning. The keyword-only
    arguments are tfdist's. The weights afterwards equal those of one process with the same
    seed, up to the order of float additions, for every synchronous strategy, any number of
    replicas and any number of examples. `docs/promise.md` lists the limits. Gradients and the
    state of metrics are summed over replicas, weighted by examples (Goyal et al., "Accurate,
    Large Minibatch SGD", 2017, section 3, says why a mean of means is wrong).

    Args:
        model: A compiled `keras.Model`, or a function without arguments that returns one.
        x: Arrays of shape [examples, ...] (NumPy, TensorFlow, pandas, SciPy), nested in dicts,
            lists or tuples. Or a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator
            of global batches `(x, y)` or `(x, y, sample_weight)`, the same on every worker.
            Or a `tfdist.ByClass`, from which `sampler` draws examples.
        y: Targets, arrays of shape [examples, ...].
        batch_size: Number of examples of one update, over all replicas; 32 if None.
        epochs: The epoch at which training ends.
        verbose: "auto", 0, 1 or 2. Only the chief prints.
        callbacks: Keras callbacks. Those that write files run only on the chief.
        validation_split: Fraction of the arrays, from their end, to validate on.
        validation_data: Validation data, of any kind that `x` may be.
        shuffle: Whether each epoch has another order of rows. "batch" changes only the order
            of batches.
        class_weight: Weight of the loss by class number. Or "balanced", "effective" or a
            `tfdist.imbalance.EffectiveNumber`, which compute weights from the class counts.
        sample_weight: Weight of the loss by example, shape [examples] or more.
        initial_epoch: The epoch at which training begins.
        steps_per_epoch: Number of updates in an epoch; the whole data if None.
        validation_steps: Number of batches to validate on; all if None.
        validation_batch_size: Like `batch_size`, for validation.
        validation_freq: Number of epochs between validations, or a list of epochs.
        strategy: "auto", "single", "mirrored", "multi_worker", "horovod",
            "parameter_server", "tpu", or an instance of `tf.distribute.Strategy`,
            `tfdist.Horovod`, `tfdist.ParameterServer` or `tfdist.Zero`.
        sampler: Chooses the rows of each step; replaces `shuffle`.
        augment: Changes training examples at random, with Keras's preprocessing layers.
        shard: None if every worker passes the same data. "local" or a `tfdist.LocalShard` if
            each worker passes its own arrays, of any number of rows, also for validation.
            Then training uses the rows of all workers, and no row leaves its worker.
        seed: Seed of sampler and augmentation. If None, that of `init`; if that is also None,
            a random one. Private training ignores the seed of `init`.
        privacy: A `tfdist.DPSGD` or `tfdist.DPFTRL` for differentially private training.
        compression: "bf16" or "fp16" to send gradients in half the bytes, or a
            `tfdist.PowerSGD` to send far fewer. If None, the strategy's setting, if it has one.
        federated: A `tfdist.FedAvg` or `tfdist.DiLoCo`: an epoch is a round, in which clients
            make several steps alone on their own rows, and a server averages them.
        checkpoint: A `tfdist.Checkpoint`, or a directory. Training saves its state there, and
            continues from the last saved state.
        verify_every: Number of steps between two comparisons of all replicas' weights. They
            are also compared at the end. If None, only at the end; if 0, never.
        whole_batch: Whether every replica computes the whole batch. Then the weights are those
            of one process for any step, but more replicas are no faster. If None, tfdist
            does so if it finds that the result of a step is not a mean over rows.

    Returns:
        Keras's `History`, the same on every worker. After private training, its attribute
        `privacy` is a `tfdist.privacy.Report`.

    Raises:
        ArgumentError: An argument or the data cannot be used.
        StrategyError: The strategy cannot run here.
        DisagreementError: The workers passed different arguments or data, or replicas differ.
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
    session, model = current(strategy), preflight.compiled_model(model)
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
    )
    return _train(request, privacy, compression, federated, checkpoint, verify_every)


def _train(
    request: Request,
    privacy: DPSGD | None,
    compression: str | PowerSGD | None,
    federated: FedAvg | None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None,
    verify_every: int | None,
) -> Any:
    """Lists the extensions that the arguments ask for, and trains with them."""
    session = request.session
    model_history.check_idle(request.model)
    extensions: list[Extension] = [Verification(verify_every)]
    if privacy is not None:
        extensions.append(PrivateTraining(privacy))
    protecting: ClientPrivacy | SiloPrivacy | None = None
    if getattr(federated, "privacy", None) is not None:
        protects_examples = isinstance(check(federated).privacy, ExampleProtection)
        protecting = (SiloPrivacy if protects_examples else ClientPrivacy)(federated)
        extensions.append(protecting)
    if compression is None:
        compression = session.strategy.compression
    extensions.append(CompressedTraining(compression))
    if federated is not None:
        extensions.append(FederatedTraining(federated, protecting))
    if session.zero is not None:
        extensions.append(ShardedOptimizer(session.zero, compression))
    if session.strategy.has_stages:
        others = {"privacy": privacy, "compression": compression, "federated": federated}
        extensions.append(PipelinedTraining(**others))
    continuation = Continuation(extensions)
    if checkpoint is not None:
        continuation = CheckpointRun(checkpoint, session.strategy, extensions)
    elif session.strategy.elastic:
        continuation = elastic.ElasticRun(session.strategy, extensions)
    # Seeds come after privacy, which may need a secret seed, and before the continuation, which
    # restores the seed of an earlier process.
    with contextlib.closing(continuation):
        return Training(request, [*extensions, Seeds(), continuation], continuation).run()
