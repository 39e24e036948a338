"""The cost model: predicted times of communication and computing, from a few constants.

A message of n bytes takes alpha + n / beta seconds, where alpha is the latency of a link and
beta its bandwidth (Hockney, "The communication challenge for MPP", Parallel Computing 20,
1994). Collectives are sums of messages (Thakur, Rabenseifner and Gropp, "Optimization of
collective communication operations in MPICH", IJHPCA 19, 2005). Computing follows a roofline
(Williams, Waterman and Patterson, CACM 52, 2009), plus a constant for each op.

No TensorFlow is needed here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tfdist.errors import ArgumentError

_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Link:
    """How processes are connected.

    Attributes:
        latency_s: Seconds that a message of no bytes takes (alpha).
        bytes_per_s: Bytes in each further second (beta), in one direction.
        source: Where the numbers come from, for the reader of a table.
    """

    latency_s: float
    bytes_per_s: float
    source: str = "default"

    def message_s(self, size: float) -> float:
        """Returns the time of one message.

        Args:
            size: Bytes.

        Example:
            >>> Link(0.001, 1e6).message_s(2e6)
            2.001
        """
        return self.latency_s + size / self.bytes_per_s

    def all_reduce_s(self, size: float, workers: int) -> float:
        """Returns the time of a ring all-reduce: a reduce-scatter and an all-gather.

        Args:
            size: Bytes of the tensor.
            workers: Number of processes.

        Example:
            >>> Link(0.001, 1e6).all_reduce_s(4e6, 4)
            6.006
        """
        return 2 * self.all_gather_s(size, workers)

    def all_gather_s(self, size: float, workers: int) -> float:
        """Returns the time in which all get the parts of all, or of a reduce-scatter.

        Args:
            size: Bytes of all parts together.
            workers: Number of processes.
        """
        if workers < 2:
            return 0.0
        return (workers - 1) * self.message_s(size / workers)

    def broadcast_s(self, size: float, workers: int) -> float:
        """Returns the time of a broadcast along a binary tree.

        Args:
            size: Bytes of the tensor.
            workers: Number of processes.
        """
        return math.ceil(math.log2(workers)) * self.message_s(size) if workers > 1 else 0.0

    def parameter_server_s(
        self, read: float, written: float, workers: int, servers: int
    ) -> float:
        """Returns the time in which all workers read the weights and send their gradients.

        A server serves all workers through one link, so it takes longer the more workers
        there are for each server.

        Args:
            read: Bytes that a worker reads in a step, from all servers.
            written: Bytes that it sends.
            workers: Number of workers.
            servers: Number of servers, each with an equal part of the weights.
        """
        crowding = max(1.0, workers / servers)
        return 2 * self.latency_s + (read + written) * crowding / self.bytes_per_s


def link_of_all_reduce(
    latency_s: float, bytes_per_s: float, workers: int, source: str = "measured"
) -> Link:
    """Returns the link on which a ring all-reduce takes a measured time.

    Args:
        latency_s: Seconds of an all-reduce of a few bytes.
        bytes_per_s: Bytes of the tensor in each further second of the all-reduce.
        workers: Number of processes that took part; at least 2.
        source: Where the numbers come from.

    Example:
        >>> link = link_of_all_reduce(0.006, 1e6, workers=4)
        >>> round(link.all_reduce_s(2e6, 4), 6)
        2.006
    """
    messages = 2 * (workers - 1)
    return Link(latency_s / messages, bytes_per_s * messages / workers, source)


# Latency and bandwidth where nothing was measured. Those of one machine are of gRPC and Gloo
# through the loopback interface (docs/development/benchmarks.md); those of networks are the
# nominal rate, of which TCP and gRPC reach some 90 %.
DEFAULT_LINKS = {
    "one machine": Link(1.2e-3, 5e8, "default for one machine"),
    "network": Link(1.5e-3, 0.9 * 1.25e8, "default, 1 Gbit/s"),
    "gpus": Link(2e-5, 1e10, "default for GPUs of one machine"),
}


def parse_rate(text: str) -> float:
    """Reads the rate of a network.

    Args:
        text: Such as "1gbit", "100 Mbit/s" or "2.5Gbit".

    Returns:
        Bytes a second.

    Raises:
        ArgumentError: The text is no rate.

    Example:
        >>> parse_rate("1gbit"), parse_rate("100 Mbit/s")
        (125000000.0, 12500000.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg])bit(?:/s)?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise ArgumentError(
            "The rate of a link must be a number with kbit, Mbit or Gbit. Received: "
            f"link={text!r}. For example: 1gbit."
        )
    return float(match[1]) * _UNITS[match[2]] / 8


def network(text: str) -> Link:
    """Returns a link with a rate that the user gives.

    Args:
        text: As in `parse_rate`.
    """
    return Link(DEFAULT_LINKS["network"].latency_s, 0.9 * parse_rate(text), f"given, {text}")


@dataclass(frozen=True)
class Work:
    """What a step computes on one device.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions.
        moved_bytes: Bytes that all ops read and write.
        ops: Number of ops.
    """

    flops: float
    moved_bytes: float
    ops: int


@dataclass(frozen=True)
class Rates:
    """How fast a device computes.

    Attributes:
        flops_per_s: Floating-point operations a second in a matrix product.
        bytes_per_s: Bytes a second that an elementwise op reads and writes.
        op_s: Seconds that an op takes in any case.
        source: Where the numbers come from.
    """

    flops_per_s: float
    bytes_per_s: float
    op_s: float
    source: str = "default"

    def seconds(self, work: Work) -> float:
        """Predicts the time of some work.

        Args:
            work: The work.

        Example:
            >>> Rates(1e9, 1e9, 1e-5).seconds(Work(2e9, 1e9, 100))
            3.001
        """
        return (
            work.flops / self.flops_per_s
            + work.moved_bytes / self.bytes_per_s
            + work.ops * self.op_s
        )


# Peak of float32 with tensor cores where a GPU has them (TF32), and bandwidth of the memory,
# from the vendors' data sheets. Training reaches some 40 % and 70 % of them.
_GPUS = {
    "H200": (4.9e14, 4.8e12),
    "H100": (4.9e14, 3.35e12),
    "A100": (1.56e14, 1.55e12),
    "L40": (9.0e13, 8.6e11),
    "L4": (6.0e13, 3.0e11),
    "A10": (6.2e13, 6.0e11),
    "V100": (1.57e13, 9.0e11),
    "T4": (8.1e12, 3.2e11),
    "P100": (9.3e12, 7.3e11),
}


def rates_of_gpu(model: str) -> Rates | None:
    """Looks up how fast a GPU computes.

    Args:
        model: Its name, as the driver says it.

    Returns:
        The rates, or None for a model that is not in the list.

    Example:
        >>> rates_of_gpu("NVIDIA A100-SXM4-40GB").source
        'looked up: A100'
    """
    # Longer names first: an "L40" is no "L4".
    for name in sorted(_GPUS, key=len, reverse=True):
        if name.lower() in model.lower():
            flops, bandwidth = _GPUS[name]
            return Rates(0.4 * flops, 0.7 * bandwidth, 6e-6, f"looked up: {name}")
    return None


def pipeline_s(compute_s: float, stages: int, microbatches: int) -> float:
    """Returns the time of a step in a pipeline whose stages take equally long.

    Args:
        compute_s: Seconds of the step on one device.
        stages: Number of devices.
        microbatches: Number of parts of a batch.

    Example:
        >>> pipeline_s(8.0, stages=2, microbatches=8)
        4.5
    """
    return compute_s / stages * (microbatches + stages - 1) / microbatches


def pays_below(saved_bytes: float, cost_s: float, workers: int) -> float:
    """Returns the bandwidth below which sending fewer bytes makes an all-reduce faster.

    Args:
        saved_bytes: By how many bytes the tensor of the all-reduce becomes smaller.
        cost_s: Seconds that the compression itself takes.
        workers: Number of processes.

    Returns:
        Bytes a second; infinity if compression costs nothing.

    Example:
        >>> pays_below(1e6, 0.01, workers=2)
        100000000.0
    """
    if cost_s <= 0:
        return math.inf
    return 2 * (workers - 1) / workers * saved_bytes / cost_s
