"""The report of `tfdist test`: all that was found, and whether training works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from tfdist.cluster.links import LinkMeasurement
from tfdist.launch.self_test.fit import Line, fit_line
from tfdist.launch.self_test.link import HostLink
from tfdist.launch.self_test.reach import Blockage
from tfdist.launch.self_test.result import ALL_REDUCE, SERVER, Result
from tfdist.launch.self_test.verdicts import Verdict, verdicts


@dataclass(frozen=True)
class SelfTestReport:
    """What a launcher of `tfdist test` knows at the end.

    Attributes:
        hosts: The machines of the run.
        blockages: Connections that could not be made.
        links: The links between the first host and each other one.
        result: The findings of the workers; None if they failed, or if the chief is on
            another host.
        lines: The line through the times of each collective.
        verdicts: What it means.
        failure: Why the workers failed; empty if they did not.
    """

    hosts: tuple[str, ...] = ()
    blockages: tuple[Blockage, ...] = ()
    links: tuple[HostLink, ...] = ()
    result: Result | None = None
    lines: tuple[tuple[str, Line], ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    failure: str = ""

    @property
    def problems(self) -> list[str]:
        """Why training does not work; empty if it works."""
        judged = [verdict.text for verdict in self.verdicts if verdict.kind == "problem"]
        failed = [self.failure] if self.failure else []
        return [*(blockage.describe() for blockage in self.blockages), *failed, *judged]

    @property
    def works(self) -> bool:
        """Whether training works."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Returns the report in types that JSON has."""
        fields = asdict(self)
        fields["lines"] = {name: asdict(line) for name, line in self.lines}
        return {"works": self.works, "problems": self.problems, **fields}

    def measurement(self) -> LinkMeasurement | None:
        """Returns what `tfdist recommend` can use; None if no collective was measured."""
        lines = dict(self.lines)
        line = lines.get(ALL_REDUCE) or lines.get(SERVER)
        if line is None or self.result is None:
            return None
        return LinkMeasurement(
            self.result.strategy,
            self.result.workers,
            max(1, len(self.hosts)),
            line.latency_s,
            line.bytes_per_s,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )


def judged(
    result: Result,
    hosts: Sequence[str],
    links: Sequence[HostLink],
    unmeasured: Sequence[str],
    cores: int,
) -> SelfTestReport:
    """Returns the report of workers that have ended well.

    Args:
        result: Their findings.
        hosts: The machines.
        links: The links between the first host and each other one.
        unmeasured: The hosts whose link could not be measured.
        cores: Number of cores of this machine.
    """
    names = list(hosts) or sorted({speed.host for speed in result.speeds if speed.host})
    lines: dict[str, Line] = {}
    for operation in dict.fromkeys(timing.operation for timing in result.timings):
        points = [(t.size, t.seconds) for t in result.timings if t.operation == operation]
        if len(points) > 1:
            lines[operation] = fit_line(points)
    verdict_list = verdicts(result, lines, links, max(1, len(names)), cores)
    verdict_list += [
        Verdict("warning", f"The link to {host} could not be measured: it did not answer.")
        for host in unmeasured
    ]
    return SelfTestReport(
        tuple(names), (), tuple(links), result, tuple(lines.items()), tuple(verdict_list)
    )
