"""Times of collectives, and the speed of each worker."""

from __future__ import annotations

import functools
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.launch.resources import usable_cores
from tfdist.launch.self_test.result import ALL_GATHER, ALL_REDUCE, SERVER, Speed, Timing

SIZES = tuple(1 << bits for bits in range(10, 27, 2))
"""Bytes of the tensors: 1 KiB to 64 MiB."""

_MOST_REPETITIONS = 20
# Sizes up to this one are measured whatever others take: small ones alone do not show the rate.
_ALWAYS = 1 << 20
# The next size takes about four times as long, for two repetitions at least.
_GROWTH, _FEWEST_REPETITIONS = 4, 2
_SPEED_S, _SPEED_ROUNDS = 0.2, 3


def sums_are_exact(strategy: Any) -> bool:
    """Returns whether the sum of integers of all replicas is exact in each dtype.

    Args:
        strategy: The strategy of this process.
    """
    replicas = strategy.place.num_replicas
    for dtype in (tf.int32, tf.int64):
        largest = (dtype.max // replicas) - 1

        def on_replica(dtype: Any = dtype, largest: int = largest) -> Any:
            mine = tf.stack(
                [tf.cast(strategy.replica_id(), dtype), tf.constant(largest, dtype)]
            )
            return strategy.all_reduce_sum([mine])[0]

        summed = _on_replicas(strategy, on_replica)()
        if [int(value) for value in summed] != [
            replicas * (replicas - 1) // 2,
            largest * replicas,
        ]:
            return False
    return True


def timings(strategy: Any, seconds: float, largest: int) -> list[Timing]:
    """Times the collectives of a strategy, with tensors of growing size.

    Args:
        strategy: The strategy of this process.
        seconds: About how long all of it may take. Large tensors are left out on slow links.
        largest: Bytes of the largest tensor.

    Returns:
        The times that the chief has measured; equal on every worker.
    """
    if strategy.place.num_replicas == 1:
        return []
    operations: dict[str, Callable[[Any], Any]] = {
        ALL_REDUCE: lambda tensor: strategy.all_reduce_sum([tensor])[0],
        ALL_GATHER: strategy.all_gather,
    }
    timings: list[Timing] = []
    for operation, collective in operations.items():
        left = seconds / len(operations)
        for size in SIZES:
            tensor = tf.ones([size // 4], tf.float32)
            run = _on_replicas(strategy, functools.partial(_first, collective, tensor))
            timed = _timed(strategy, operation, size, run, left)
            timings.append(timed)
            left -= timed.seconds * timed.repetitions
            # All workers must go on, or none.
            if strategy.broadcast_object(_is_last(timed, left, seconds, largest)):
                break
    return timings


def _first(collective: Callable[[Any], Any], tensor: Any) -> Any:
    return collective(tf.identity(tensor))[:1]  # Horovod needs a tensor of the graph


def _timed(
    strategy: Any, operation: str, size: int, run: Callable[[], Any], left: float
) -> Timing:
    run()  # traced, and connected
    wanted = _repetitions(_seconds(run), left)
    repetitions = int(strategy.broadcast_object(wanted))
    times = [_seconds(run) for _ in range(repetitions)]
    median = float(strategy.broadcast_object(statistics.median(times)))
    return Timing(operation, size, median, repetitions)


def _repetitions(once: float, left: float) -> int:
    wanted = int(max(left, 0.0) / len(SIZES) / max(once, 1e-9))
    return max(_FEWEST_REPETITIONS, min(_MOST_REPETITIONS, wanted))


def _is_last(timed: Timing, left: float, seconds: float, largest: int) -> bool:
    """Returns whether the next size is too large, or would take too long."""
    size = timed.size * _GROWTH
    limit = seconds if size <= _ALWAYS else left
    return size > largest or _GROWTH * _FEWEST_REPETITIONS * timed.seconds > limit


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _on_replicas(strategy: Any, function: Callable[[], Any]) -> Callable[[], Any]:
    compiled = tf.function(lambda: strategy.run(function), autograph=False)
    return lambda: compiled().numpy()


def speeds(strategy: Any) -> list[Speed]:
    """Measures how fast each worker computes while all compute.

    Args:
        strategy: The strategy of this process.

    Returns:
        The speeds of all workers.
    """
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    run, operations = _products(kind, lambda compute: strategy.run(compute))
    run()
    strategy.gather_objects(0)  # all begin together
    own = Speed(
        strategy.place.worker_index,
        socket.gethostname(),
        kind,
        operations * strategy.place.local_replicas / _fastest(run),
        int(os.environ.get("TF_NUM_INTRAOP_THREADS") or usable_cores()),
    )
    return list(strategy.gather_objects(own))


def _products(
    kind: str, placed: Callable[[Callable[[], Any]], Any]
) -> tuple[Callable[[], Any], float]:
    """Returns a function that multiplies matrices, and the number of its operations."""
    edge, products = (4096, 20) if kind == "GPU" else (384, 4)

    # A tensor from outside of the function: constants would be multiplied while it is traced.
    start = tf.fill([edge, edge], 1.0 / edge)

    def compute() -> Any:
        matrix = start
        for _ in range(products):
            matrix = matrix @ matrix
        return matrix[0, 0]

    function = tf.function(lambda: placed(compute), autograph=False)
    return lambda: tf.nest.flatten(function())[0].numpy(), 2.0 * edge**3 * products


def _fastest(run: Callable[[], Any]) -> float:
    """Returns the seconds of a call, in the best of some rounds: others may disturb."""
    rounds = []
    for _ in range(_SPEED_ROUNDS):
        calls, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < _SPEED_S:
            run()
            calls += 1
        rounds.append(passed / calls)
    return min(rounds)


def server_timings(servers: int, seconds: float, largest: int) -> list[Timing]:
    """Times how the first worker reads variables of a server and adds to them.

    Args:
        servers: Number of parameter servers; each has an equal part of the bytes.
        seconds: About how long it may take.
        largest: Bytes of all variables together.
    """
    timings: list[Timing] = []
    left = seconds
    for size in SIZES:
        run = _server_step(size // 4 // servers or 1, servers)
        run()
        repetitions = _repetitions(_seconds(run), left)
        median = statistics.median(_seconds(run) for _ in range(repetitions))
        timings.append(Timing(SERVER, size, median, repetitions))
        left -= median * repetitions
        if _is_last(timings[-1], left, seconds, largest):
            break
    return timings


def _server_step(elements: int, servers: int) -> Callable[[], Any]:
    variables = []
    for server in range(servers):
        with tf.device(f"/job:ps/task:{server}/device:CPU:0"):
            variables.append(tf.Variable(tf.zeros([elements])))

    def step() -> Any:
        with tf.device("/job:worker/task:0/device:CPU:0"):
            values = [variable.read_value() + 1.0 for variable in variables]
        updates = []
        for server, (variable, value) in enumerate(zip(variables, values, strict=True)):
            with tf.device(f"/job:ps/task:{server}/device:CPU:0"):
                updates.append(variable.assign_add(value, read_value=False))
        with tf.control_dependencies(updates):
            return tf.constant(0)

    function = tf.function(step, autograph=False)
    return lambda: function().numpy()


def server_speeds(workers: int) -> list[Speed]:
    """Measures how fast each worker of a run with parameter servers computes, one by one.

    Args:
        workers: Number of workers.
    """
    speeds = []
    for worker in range(workers):
        prefix = f"/job:worker/task:{worker}"
        remote = [d for d in tf.config.list_logical_devices() if prefix in d.name]
        kind = "GPU" if any(d.device_type == "GPU" for d in remote) else "CPU"

        def placed(compute: Callable[[], Any], name: str = f"{prefix}/device:{kind}:0") -> Any:
            with tf.device(name):
                return compute()

        run, operations = _products(kind, placed)
        run()
        threads = int(os.environ.get("TF_NUM_INTRAOP_THREADS") or usable_cores())
        speeds.append(Speed(worker, "", kind, operations / _fastest(run), threads))
    return speeds
