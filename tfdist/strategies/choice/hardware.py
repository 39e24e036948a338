"""The machines on which something is to be trained, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from tfdist.cluster.cost import DEFAULT_LINKS, Link, Rates, link_of_all_reduce
from tfdist.cluster.links import LinkMeasurement

# A core of a server of the last years, with vector instructions, as TensorFlow uses it.
DEFAULT_CORE = Rates(3e10, 6e9, 8e-6, "default for a core")


@dataclass(frozen=True)
class Hardware:
    """Equal hosts, and the links between them.

    Attributes:
        hosts: Number of machines.
        cores: Cores of each.
        memory_bytes: Memory of each, that processes may use.
        gpus: Models of the GPUs of each.
        gpu_bytes: Memory of each GPU.
        rates: How fast one device computes: a GPU, or all cores of a machine.
        has_horovod: Whether Horovod is installed.
        links: What `tfdist test` has measured.
        network: The link between hosts, if the user has given its rate.
    """

    hosts: int
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    gpu_bytes: int = 0
    rates: Rates = DEFAULT_CORE
    has_horovod: bool = True
    links: tuple[LinkMeasurement, ...] = ()
    network: Link | None = None

    @property
    def devices(self) -> int:
        """Number of devices of a host that compute independently: GPUs, or else cores."""
        return len(self.gpus) or self.cores

    def cores_of_worker(self, local_workers: int) -> int:
        """Returns the cores of each of several workers of a host.

        Args:
            local_workers: Workers of the host.
        """
        return max(1, self.cores // local_workers)

    def crowding(self, local_workers: int) -> float:
        """Returns how many times longer a worker computes because others share its core.

        Args:
            local_workers: Workers of a host.
        """
        return 1.0 if self.gpus else max(1.0, local_workers / self.cores)

    def link(self, strategy: str, workers: int, hosts: int) -> Link:
        """Returns the link of a strategy's collectives, measured or by its kind.

        Args:
            strategy: The strategy that connects the workers.
            workers: Number of workers.
            hosts: On how many hosts.
        """
        if hosts > 1 and self.network is not None:
            return self.network
        measured = [
            link
            for link in self.links
            if link.strategy == strategy and (link.hosts > 1) == (hosts > 1)
        ]
        # The newest of those with the nearest number of workers.
        nearest = min(
            reversed(measured), key=lambda link: abs(link.workers - workers), default=None
        )
        if nearest is not None and nearest.workers > 1:
            return _as_link(nearest)
        if hosts > 1:
            return DEFAULT_LINKS["network"]
        if self.gpus:
            return DEFAULT_LINKS["gpus"]
        return DEFAULT_LINKS.get(f"one machine, {strategy}", DEFAULT_LINKS["one machine"])


def _as_link(measured: LinkMeasurement) -> Link:
    source = f"measured {measured.measured_at[:10]}"
    if measured.strategy == "parameter_server":
        # It is a read and a write of the same bytes.
        return Link(measured.latency_s / 2, 2 * measured.bytes_per_s, source)
    return link_of_all_reduce(
        measured.latency_s, measured.bytes_per_s, measured.workers, source
    )
