"""What each strategy would do with a workload: whether it can, its memory and its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tfdist.cluster.cost import pipeline_s
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.choice.workload import Workload

# Seconds that Keras's loop takes for a step beside it: the iterator, logs and callbacks.
LOOP_S = 6e-4
# A process with TensorFlow, without a model.
PROCESS_BYTES = 400 * 2**20
# Batches that the input pipeline prepares ahead.
_AHEAD = 3
_MICROBATCHES = 8
# Messages of the coordinator for a step on parameter servers.
_COORDINATOR_S = 4e-3


@dataclass(frozen=True)
class Candidate:
    """A strategy, with a number of workers.

    Attributes:
        strategy: Its name in a table.
        workers: Number of workers, or of devices of one process.
        hosts: Number of machines.
        servers: Number of parameter servers.
        obstacle: Why it cannot run, in a few words; None if it can.
        changes_result: How its result differs from that of one process; None if it does not.
        memory: Bytes of a worker, by what they are for.
        limit: Bytes that a worker may use.
        compute_s: Predicted seconds of computing in a step.
        communication_s: Seconds of communication that nothing hides.
        input_s: Seconds by which the input pipeline makes a step longer.
        efficiency: How many times faster than one process, divided by the number of GPUs, or
            without GPUs by the number of machines.
        link_source: Where the numbers of the link come from; empty without one.
    """

    strategy: str
    workers: int = 1
    hosts: int = 1
    servers: int = 0
    obstacle: str | None = None
    changes_result: str | None = None
    memory: Mapping[str, int] | None = None
    limit: int = 0
    compute_s: float = 0.0
    communication_s: float = 0.0
    input_s: float = 0.0
    efficiency: float = 1.0
    link_source: str = ""

    @property
    def memory_bytes(self) -> int:
        """Bytes of a worker."""
        return sum((self.memory or {}).values())

    @property
    def fits(self) -> bool:
        """Whether a worker has enough memory."""
        return self.memory_bytes <= self.limit

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step."""
        return self.compute_s + self.communication_s + self.input_s

    @property
    def is_possible(self) -> bool:
        """Whether it runs here, fits, and gives the result of one process."""
        return self.obstacle is None and self.changes_result is None and self.fits

    @property
    def bottleneck(self) -> str:
        """What takes most of a step."""
        parts = {
            "computing": self.compute_s,
            "communication": self.communication_s,
            "input": self.input_s,
        }
        return max(parts, key=lambda name: parts[name])


def candidates(
    load: Workload, hardware: Hardware, workers: int | None = None, servers: int = 0
) -> list[Candidate]:
    """Predicts each strategy, with its fastest number of workers.

    Args:
        load: What is trained.
        hardware: Where.
        workers: The number of workers; None for any that the hardware has devices for.
        servers: The number of parameter servers, if they were asked for.
    """
    counts = _counts(hardware) if workers is None else [workers]
    several = [count for count in counts if count > 1]
    alone, devices = _single(load, hardware), hardware.devices

    def fastest(predict: Callable[[int, int], Candidate]) -> Candidate:
        # Workers that nobody has placed fill one host after the other.
        return _fastest(
            predict(n, hardware.hosts if workers else min(hardware.hosts, -(-n // devices)))
            for n in several or [2]
        )

    unlimited = [
        alone,
        _mirrored(load, hardware),
        fastest(lambda n, on: _parallel(load, hardware, "multi_worker", n, on)),
        fastest(lambda n, on: _parallel(load, hardware, "horovod", n, on)),
        fastest(lambda n, on: _servers(load, hardware, n, on, servers or 1)),
        fastest(lambda n, on: _parallel(load, hardware, "zero 1", n, on)),
        fastest(lambda n, on: _parallel(load, hardware, "zero 3", n, on)),
        fastest(lambda n, on: _parallel(load, hardware, "model parallel", n, on)),
        _pipeline(load, hardware),
        fastest(lambda n, on: _federated(load, hardware, n, on)),
    ]
    return [_limited(candidate, load, alone, bool(hardware.gpus)) for candidate in unlimited]


def _counts(hardware: Hardware) -> list[int]:
    """Lists numbers of workers: powers of two, and all devices."""
    total = hardware.hosts * hardware.devices
    return sorted({total, *(2**i for i in range(total.bit_length()) if 2**i < total)})


def _fastest(options: Iterable[Candidate]) -> Candidate:
    # What fits comes first, whatever it takes.
    return min(options, key=lambda c: (c.obstacle is not None, not c.fits, c.step_s))


def _limited(
    candidate: Candidate, load: Workload, alone: Candidate, has_gpus: bool
) -> Candidate:
    """Adds what is refused, and the efficiency."""
    obstacle = candidate.obstacle or load.refused.get(candidate.strategy)
    efficiency = 1.0
    if candidate.step_s:
        # A single process uses all cores of its machine, but one GPU.
        devices = candidate.workers if has_gpus else candidate.hosts
        efficiency = alone.step_s / candidate.step_s / devices
    return replace(candidate, obstacle=obstacle, efficiency=efficiency)


def _single(load: Workload, hardware: Hardware) -> Candidate:
    cores = hardware.cores_of_worker(1)
    compute = load.compute_s(load.batch_size, cores, hardware.rates) + LOOP_S
    return Candidate(
        "single",
        memory=worker_memory(load, hardware, load.batch_size),
        limit=_limit(hardware, 1),
        compute_s=compute,
        input_s=_input_s(load, compute, hardware, 1),
    )


def _mirrored(load: Workload, hardware: Hardware) -> Candidate:
    count = len(hardware.gpus)
    if count < 2:
        device = "one GPU" if count else "no GPU"
        return Candidate("mirrored", obstacle=f"{device} here: one replica, the same as single")
    return _parallel(load, hardware, "mirrored", count, 1)


def _parallel(
    load: Workload, hardware: Hardware, name: str, workers: int, hosts: int
) -> Candidate:
    """Predicts data parallelism, with the training's state whole or in parts."""
    on = name if name in ("mirrored", "multi_worker", "horovod") else "multi_worker"
    local = -(-workers // hosts)
    obstacle = None
    if name == "horovod" and not hardware.has_horovod:
        obstacle = "Horovod is not installed: tfdist horovod build"
    elif hardware.gpus and local > len(hardware.gpus):
        obstacle = f"{local} workers on a host, which has {len(hardware.gpus)} GPUs"
    elif name == "model parallel" and load.variables < 2:
        obstacle = "the model has nothing to divide"
    is_whole = load.indivisible is not None
    rows = load.batch_size if is_whole else -(-load.batch_size // workers)
    link = hardware.link(on, workers, hosts)
    stage = {"zero 1": 1, "zero 3": 3, "model parallel": 3}.get(name, 0)
    sent = 0 if is_whole else load.gradient_bytes
    communication = link.all_reduce_s(sent, workers)
    if stage == 3:
        # The weights are gathered for the forward and again for the backward pass.
        communication += link.all_gather_s(load.weight_bytes, workers)
    compute = _compute(load, hardware, rows, local)
    return Candidate(
        name,
        workers,
        hosts,
        obstacle=obstacle,
        memory=worker_memory(load, hardware, rows, workers, stage),
        limit=_limit(hardware, local),
        compute_s=compute,
        communication_s=communication,
        input_s=_input_s(load, compute + communication, hardware, local),
        link_source=link.source,
    )


def _servers(
    load: Workload, hardware: Hardware, workers: int, hosts: int, servers: int
) -> Candidate:
    """Predicts synchronous training with parameter servers."""
    local = -(-workers // hosts)
    is_whole = load.indivisible is not None
    rows = load.batch_size if is_whole else -(-load.batch_size // workers)
    link = hardware.link("parameter_server", workers, hosts)
    communication = _COORDINATOR_S + link.parameter_server_s(
        load.weight_bytes, load.gradient_bytes, workers, servers
    )
    compute = _compute(load, hardware, rows, local)
    memory = worker_memory(load, hardware, rows, workers)
    memory["optimizer"] = 0  # it is on the servers
    return Candidate(
        "parameter_server",
        workers,
        hosts,
        servers,
        memory=memory,
        limit=_limit(hardware, local + 2),  # a server and the chief
        compute_s=compute,
        communication_s=communication,
        input_s=_input_s(load, compute + communication, hardware, local),
        link_source=link.source,
    )


def _pipeline(load: Workload, hardware: Hardware) -> Candidate:
    stages = len(hardware.gpus)
    if stages < 2:
        device = "one GPU" if stages else "no GPU"
        return Candidate("pipeline", obstacle=f"it needs several devices; {device} here")
    whole = load.compute_s(load.batch_size, hardware.cores, hardware.rates)
    # The backward pass computes the activations again, which is a third of a step more.
    compute = pipeline_s(whole * 4 / 3, stages, _MICROBATCHES) + LOOP_S
    memory = worker_memory(load, hardware, -(-load.batch_size // _MICROBATCHES))
    memory = {name: -(-size // stages) for name, size in memory.items()}
    return Candidate(
        "pipeline",
        stages,
        memory=memory,
        limit=_limit(hardware, 1),
        compute_s=compute,
        input_s=_input_s(load, compute, hardware, 1),
        link_source=hardware.link("mirrored", stages, 1).source,
    )


def _federated(load: Workload, hardware: Hardware, workers: int, hosts: int) -> Candidate:
    """Predicts a local step of federated training; weights are averaged once in a round."""
    one = _parallel(load, hardware, "multi_worker", workers, hosts)
    return replace(
        one,
        strategy="federated",
        communication_s=0.0,
        changes_result="clients train alone and are averaged once a round",
    )


def _compute(load: Workload, hardware: Hardware, rows: int, local: int) -> float:
    cores = hardware.cores_of_worker(local)
    compute = load.compute_s(rows, cores, hardware.rates) + LOOP_S
    return compute * hardware.crowding(local)


def _input_s(load: Workload, other_s: float, hardware: Hardware, local: int) -> float:
    """Returns by how much the input pipeline makes a step longer.

    It works while the step does, so only what exceeds the step counts. Each worker draws the
    whole batch's numbers, and reads its own rows.
    """
    if load.input_s is None:
        return 0.0
    crowding = 1.0 if hardware.cores > local else max(1.0, local / hardware.cores)
    return max(0.0, load.input_s * crowding - other_s)


def worker_memory(
    load: Workload, hardware: Hardware, rows: int, workers: int = 1, stage: int = 0
) -> dict[str, int]:
    """Returns the bytes of a worker, by what they are for.

    Args:
        load: What is trained.
        hardware: Where.
        rows: Rows of the worker's part of a batch.
        workers: Number of workers.
        stage: 0, or the stage of `tfdist.Zero`.

    Returns:
        Bytes for weights, the optimizer's state, gradients and their sums, activations and
        temporary tensors, and the input's buffers; without GPUs also for the process and data.
    """
    step = load.memory_with(rows)
    state_parts = workers if stage else 1
    weight_parts = workers if stage == 3 else 1
    sums = load.gradient_bytes // weight_parts if workers > 1 else 0
    gradients = load.gradient_bytes
    # Sums are there only after the backward pass, when no activations are left.
    most = max(step.peak, gradients + sums)
    on_cpu = {} if hardware.gpus else {"process": PROCESS_BYTES, "data": load.data_bytes}
    return {
        "weights": -(-load.weight_bytes // weight_parts),
        "optimizer": -(-load.slot_bytes // state_parts),
        "gradients": gradients,
        "activations": max(0, most - gradients),
        "input": _AHEAD * step.inputs,
        **on_cpu,
    }


def _limit(hardware: Hardware, processes: int) -> int:
    return hardware.gpu_bytes if hardware.gpus else hardware.memory_bytes // processes
