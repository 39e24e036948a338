"""`tfdist.recommend`: describes a training, and asks for the best strategy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras, data
from tfdist.cluster import Cluster, links
from tfdist.cluster.cost import Rates, network, rates_of_gpu
from tfdist.data.imbalance.report import report
from tfdist.errors import ArgumentError, TfdistError
from tfdist.launch.machine import gpus_with_memory, usable_memory
from tfdist.launch.resources import usable_cores
from tfdist.samplers import Uniform
from tfdist.scripts.refusals import Call, refused
from tfdist.step.workload import describe, first_batch, measured_rates
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.choice.recommendation import Recommendation, recommend_for
from tfdist.strategies.choice.workload import Workload
from tfdist.training.preflight import compiled_model

_MOST_POINTS = 3


@dataclass(frozen=True)
class Where:
    """The workers that are asked for.

    Attributes:
        workers: Their number; None for any that the machine has devices for.
        hosts: Number of machines like this one.
        servers: Number of parameter servers.
        link: The rate of the network between hosts, such as "1gbit".
    """

    workers: int | None = None
    hosts: int = 1
    servers: int = 0
    link: str | None = None


def recommend(
    model: Any,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    *,
    workers: int | None = None,
    hosts: int = 1,
    servers: int = 0,
    link: str | None = None,
    measure: bool = True,
) -> Recommendation:
    """Recommends a strategy for a model and its data, with a prediction for each strategy.

    Memory is estimated as in `tfdist.memory`. Computing is timed here for a second or two, on
    as many cores as a worker would have; weights and random states are as before afterwards.
    Communication follows from what `tfdist test` has measured, or else from usual values for
    the kind of link. The table says which of the two.

    Args:
        model: A compiled `keras.Model`, or a function without arguments that returns one.
        x: Training data, as in `fit`. None for made-up data of the shapes of the model's
            inputs.
        y: Targets, as in `fit`.
        batch_size: Examples of a global batch. None for 32, or that of the batches of `x`.
        workers: Number of worker processes. None for any that this machine, or the cluster of
            this process, has devices for.
        hosts: Number of machines like this one.
        servers: Number of parameter servers, for the row of `parameter_server`.
        link: The rate of the network between the hosts, such as "1gbit". None for what was
            measured, or 1 Gbit/s.
        measure: Whether the step and the input pipeline may be timed. If not, the time
            follows from FLOPs and the rate of the device.

    Returns:
        The recommendation. Print it, or show it in a notebook.

    Raises:
        ArgumentError: The model is not compiled, its inputs are unknown, or an argument cannot
            be used.

    Example:
        >>> import keras, tfdist
        >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(10)])
        >>> model.compile("adam", "mse")
        >>> tfdist.recommend(model, batch_size=64).best.strategy
        'single'
    """
    call = Call(model, x, y, {"batch_size": batch_size})
    return recommend_call(call, Where(workers, hosts, servers, link), measure=measure)


def recommend_call(
    call: Call, where: Where, *, measure: bool = True, script: str = "train.py"
) -> Recommendation:
    """Recommends a strategy for a call of `fit`.

    Args:
        call: The call.
        where: The workers.
        measure: As in `recommend`.
        script: The script, for the command.
    """
    _check(where)
    model = compiled_model(call.model)
    where = _in_cluster(where)
    source, batch = _data(model, call)
    hardware = hardware_here(where, measure)
    batch_size = int(_keras.rows_of(batch))
    points = _points(batch_size, hardware, where.workers)
    with _keras.keeping_random_state():
        load = describe(model, batch, points, source=source, measure=measure)
    load = dataclasses.replace(load, refused=refused(model, source, call, hardware))
    load = _with_classes(load, call)
    return recommend_for(
        load, hardware, workers=where.workers, servers=where.servers, script=script
    )


def workload(call: Call, counts: list[int]) -> Workload:
    """Describes a call of `fit` without timing anything, for `tfdist estimate`.

    Args:
        call: The call.
        counts: Numbers of replicas.
    """
    model = compiled_model(call.model)
    source, batch = _data(model, call)
    batch_size = int(_keras.rows_of(batch))
    points = [(-(-batch_size // count), 1) for count in counts]
    with _keras.keeping_random_state():
        return describe(model, batch, points, source=source, measure=False)


def _check(where: Where) -> None:
    for name, number, least in (
        ("workers", where.workers, 1),
        ("hosts", where.hosts, 1),
        ("servers", where.servers, 0),
    ):
        is_number = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and (not is_number or number < least):
            raise ArgumentError(
                f"`{name}` must be a whole number of at least {least}. Received: "
                f"{name}={number!r}."
            )
    if where.workers is not None and where.workers % where.hosts:
        raise ArgumentError(
            "Each host must have the same number of workers. Received: "
            f"workers={where.workers} on hosts={where.hosts}."
        )


def _in_cluster(where: Where) -> Where:
    """Takes the workers of the cluster of this process, if the user names none."""
    cluster = Cluster.from_environment()
    if where.workers is not None or cluster.num_workers == 1:
        return where
    hosts = len({address.rpartition(":")[0] for address in cluster.workers}) or 1
    servers = len(cluster.jobs.get("ps", ()))
    return dataclasses.replace(where, workers=cluster.num_workers, hosts=hosts, servers=servers)


def hardware_here(where: Where, measure: bool = True) -> Hardware:
    """Describes this machine, and others like it.

    Args:
        where: The workers.
        measure: Whether the rate of the device may be measured.
    """
    cores = usable_cores()
    gpus = gpus_with_memory()
    seen_by_tensorflow = len(tf.config.list_physical_devices("GPU"))
    gpus = gpus[:seen_by_tensorflow]
    rates: Rates | None = rates_of_gpu(gpus[0][0]) if gpus else None
    if rates is None:
        rates = measured_rates(cores) if measure else _default_rates(cores)
    return Hardware(
        hosts=where.hosts,
        cores=cores,
        memory_bytes=usable_memory(),
        gpus=tuple(name for name, _ in gpus),
        gpu_bytes=min((size for _, size in gpus), default=0),
        rates=rates,
        has_horovod=find_spec("horovod") is not None,
        links=tuple(links.read()),
        network=None if where.link is None else network(where.link),
    )


def _default_rates(cores: int) -> Rates:
    one = Hardware(1, 1, 0).rates
    return dataclasses.replace(
        one, flops_per_s=one.flops_per_s * cores, source=f"default for {cores} cores"
    )


def _data(model: Any, call: Call) -> tuple[data.Source | None, Any]:
    """Reads the data, builds the model, and draws a batch."""
    batch_size = call.others.get("batch_size")
    if call.x is None:
        size = 32 if batch_size is None else batch_size
        return None, _made_up(model, size)
    settings = data.SourceSettings(
        batch_size=batch_size,
        steps=call.others.get("steps_per_epoch"),
        sampler=call.others.get("sampler") or Uniform(),
        shuffle=True,
        seed=0,
        training=True,
        class_weight=call.others.get("class_weight"),
        augment=call.others.get("augment"),
    )
    source = data.read(call.x, call.y, call.others.get("sample_weight"), settings)
    _keras.build(model, "train_step", source.spec(), source.sample)
    batch = first_batch(source)
    is_dense = all(isinstance(leaf, tf.Tensor) for leaf in tf.nest.flatten(batch))
    if batch is None or not is_dense:
        raise ArgumentError(
            "A batch must be drawn, or made up of dense tensors. Received: x of type "
            f"{type(call.x).__name__}, which can be drawn once, or is ragged or sparse. Pass "
            "dense arrays, or a tf.data.Dataset that can be read again."
        )
    return source, batch


def _made_up(model: Any, rows: Any) -> Any:
    """Makes a batch up, of a model that knows the shapes of its inputs."""
    if not isinstance(rows, int) or rows < 1:
        raise ArgumentError(
            f"`batch_size` must be a positive whole number. Received: batch_size={rows!r}."
        )
    specs = _keras.batch_specs(model, rows, None, None) if model.built else None
    if specs is None:
        raise ArgumentError(
            "`x` must be given for a model that does not know the shapes of its inputs. "
            f"Received: model {model.name!r} and x=None. Pass some examples."
        )
    _keras.build(model, "train_step", specs, lambda: made_up)
    random = np.random.default_rng(0)

    def tensor(spec: Any) -> Any:
        # A whole number 0 or 1 is in every table of classes or words.
        numbers = random.uniform(0.05, 0.95, spec.shape)
        return tf.cast(numbers if spec.dtype.is_floating else numbers > 0.5, spec.dtype)

    made_up = tf.nest.map_structure(tensor, specs)
    return made_up


def _points(batch_size: int, hardware: Hardware, workers: int | None) -> list[tuple[int, int]]:
    """Lists the rows and cores of a device, for a few numbers of workers."""
    total = hardware.hosts * hardware.devices
    counts = [1, 2, total] if workers is None else [1, workers]
    points: dict[tuple[int, int], None] = {}
    for count in counts:
        local = -(-count // hardware.hosts)
        rows = -(-batch_size // count)
        cores = hardware.cores if hardware.gpus else hardware.cores_of_worker(local)
        points[rows, cores] = None
    return list(points)[:_MOST_POINTS]


def _with_classes(load: Workload, call: Call) -> Workload:
    """Counts classes, if the targets are arrays of them."""
    labels = call.y
    loss = str(getattr(call.model, "loss", ""))
    is_classes = (
        "entropy" in loss.lower()
        or "crossentropy" in type(getattr(call.model, "loss", None)).__name__.lower()
    )
    if labels is None or not is_classes:
        return load
    try:
        found = report(np.squeeze(np.asarray(labels)))
    except (TfdistError, TypeError, ValueError):  # probabilities, texts, several outputs
        return load
    if len(found.counts) < 2:
        return load
    return dataclasses.replace(load, classes=len(found.counts), class_ratio=found.ratio)
