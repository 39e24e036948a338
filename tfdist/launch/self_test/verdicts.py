"""What the numbers of `tfdist test` mean, in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tfdist.launch.self_test.fit import Line
from tfdist.launch.self_test.link import HostLink
from tfdist.launch.self_test.result import ALL_REDUCE, SERVER, Result

_SLOW = 1.5
_SLOW_LINK = 2.0
_WEIGHTS = 1_000_000
_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Verdict:
    """A sentence about the run.

    Attributes:
        kind: "problem": training would be wrong or impossible. "warning": it would be slower
            than it could be. "note": worth knowing.
        text: The sentence.
    """

    kind: str
    text: str


def verdicts(
    result: Result,
    lines: dict[str, Line],
    links: Sequence[HostLink],
    hosts: int,
    cores: int,
) -> list[Verdict]:
    """Judges what was found.

    Args:
        result: The findings of the workers.
        lines: The line through the times of each operation.
        links: The links between the first host and the others.
        hosts: Number of machines.
        cores: Number of cores of this machine.
    """
    return [
        *_of_trainings(result),
        *_of_speeds(result),
        *_of_links(links),
        *_of_collectives(result, lines),
        *_of_machine(result, hosts, cores),
    ]


def _of_trainings(result: Result) -> list[Verdict]:
    found = []
    for compared in result.trainings:
        if compared.differs:
            listed = " and ".join(f"worker {i}" for i in compared.differs)
            found.append(
                Verdict(
                    "problem",
                    f"{compared.training}: {listed} and worker 0 have different weights after "
                    "the same training. Compare what `tfdist doctor` says on their hosts.",
                )
            )
        if not compared.distance <= compared.tolerance:
            found.append(
                Verdict(
                    "problem",
                    f"{compared.training}: the weights differ from those of one process "
                    f"by {compared.distance:.1e} of the largest, more than "
                    f"{compared.tolerance:g}.",
                )
            )
    if not result.sums_are_exact:
        found.append(Verdict("problem", "The sum of integers of all replicas is not exact."))
    return found


def _of_speeds(result: Result) -> list[Verdict]:
    found = []
    for speed in result.speeds:
        others = [other for other in result.speeds if other is not speed]
        if not others:
            continue
        ratio = statistics.median(other.flops for other in others) / speed.flops
        if ratio < _SLOW:
            continue
        whom = "the others" if len(others) > 1 else f"worker {others[0].worker}"
        where = f" (on {speed.host})" if speed.host else ""
        found.append(
            Verdict(
                "warning",
                f"worker {speed.worker}{where} is {ratio:.1f} times slower than {whom}. In "
                "synchronous training all wait for it.",
            )
        )
    return found


def _of_links(links: Sequence[HostLink]) -> list[Verdict]:
    found = []
    for link in links:
        others = [other.bytes_per_s for other in links if other is not link]
        if others and statistics.median(others) >= _SLOW_LINK * link.bytes_per_s:
            found.append(
                Verdict(
                    "warning",
                    f"The link to {link.target} carries {_gbit(link.bytes_per_s)}, those to "
                    f"the other hosts {_gbit(statistics.median(others))}.",
                )
            )
        slower, faster = sorted((link.to_bytes_per_s, link.from_bytes_per_s))
        if faster >= _SLOW_LINK * slower:
            ends = (link.source, link.target)
            source, target = ends if link.to_bytes_per_s == slower else ends[::-1]
            found.append(
                Verdict(
                    "warning",
                    f"The link from {source} to {target} carries {_gbit(slower)}, in the other "
                    f"direction {_gbit(faster)}.",
                )
            )
    return found


def _of_collectives(result: Result, lines: dict[str, Line]) -> list[Verdict]:
    size = _WEIGHTS * _BYTES_PER_WEIGHT
    if SERVER in lines:
        line = lines[SERVER]
        return [
            Verdict(
                "note",
                f"{_gbit(line.bytes_per_s)} to the servers: with 1 million weights, a worker "
                f"spends {_ms(line.seconds(size))} a step on reading and adding.",
            )
        ]
    if ALL_REDUCE not in lines:
        return []
    line = lines[ALL_REDUCE]
    limit = smallest_step(line, size, result.replicas)
    more = "a second replica does" if result.replicas == 2 else "more replicas do"
    return [
        Verdict(
            "note",
            f"{_gbit(line.bytes_per_s)} in an all-reduce: with 1 million weights, below "
            f"{_ms(limit)} a step in one process {more} not pay.",
        )
    ]


def smallest_step(line: Line, size: float, replicas: int) -> float:
    """Returns the step time of one process above which replicas are faster than one.

    With R replicas, a step takes the R-th part of its computing, and an all-reduce of the
    gradients: `t / R + c < t` if `t > c * R / (R - 1)`.

    Args:
        line: The time of an all-reduce.
        size: Bytes of the gradients.
        replicas: Number of replicas, 2 or more.
    """
    return line.seconds(size) * replicas / (replicas - 1)


def _of_machine(result: Result, hosts: int, cores: int) -> list[Verdict]:
    uses_processor = all(speed.device == "CPU" for speed in result.speeds)
    if hosts > 1 or result.workers < 2 or not uses_processor:
        return []
    return [
        Verdict(
            "note",
            f"All {result.workers} workers share the {cores} cores of this machine, which one "
            "process can use too. The times say nothing about several machines.",
        )
    ]


def _gbit(bytes_per_s: float) -> str:
    bits = 8 * bytes_per_s
    return f"{bits / 1e9:.2g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"
