"""The recommendation: the best strategy, the second, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfdist.strategies.choice import page
from tfdist.strategies.choice.advice import advice
from tfdist.strategies.choice.candidates import Candidate, candidates
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.choice.workload import Workload

# A strategy with more processes must be this much faster than one with fewer.
_WORTH_IT = 0.95
# Of two that are equally fast, the one that needs less comes first.
_SIMPLEST = ("single", "mirrored", "multi_worker", "zero 1", "horovod", "zero 3")


@dataclass(frozen=True)
class Recommendation:
    """Which strategy to use, and why. It prints as a table.

    Attributes:
        workload: What is trained, in numbers.
        hardware: Where, in numbers.
        candidates: All strategies.
        best: The recommended one; None if none fits.
        second: The next one, or None.
        reason: Why, in one sentence.
        advice: What would make training faster, or let it fit.
        command: The command to run.
    """

    workload: Workload
    hardware: Hardware
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    second: Candidate | None
    reason: str
    advice: tuple[str, ...]
    command: str

    def __str__(self) -> str:
        return page.as_text(self)

    def __rich__(self) -> Any:
        return page.as_page(self)

    def _repr_html_(self) -> str:
        return page.as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers and texts, for JSON."""
        return page.as_dict(self)


def recommend_for(
    load: Workload,
    hardware: Hardware,
    *,
    workers: int | None = None,
    servers: int = 0,
    script: str = "train.py",
) -> Recommendation:
    """Chooses the strategy for a workload.

    Only strategies that run here, that fit, and whose result is that of one process are
    recommended. Of those, the one with the shortest predicted step is.

    Args:
        load: What is trained.
        hardware: Where.
        workers: The number of workers; None for any that the hardware has devices for.
        servers: The number of parameter servers, if they were asked for.
        script: The script, for the command.

    Returns:
        The recommendation.
    """
    all_candidates = candidates(load, hardware, workers, servers)
    order = _ordered([c for c in all_candidates if c.is_possible])
    best = order[0] if order else None
    second = order[1] if len(order) > 1 else None
    return Recommendation(
        load,
        hardware,
        tuple(all_candidates),
        best,
        second,
        _reason(load, best, second, all_candidates),
        tuple(advice(load, hardware, best, all_candidates)),
        "" if best is None else command(best, script),
    )


def _ordered(possible: list[Candidate]) -> list[Candidate]:
    """Sorts candidates by their time. Those with more processes must be clearly faster."""

    def place(candidate: Candidate) -> int:
        name = candidate.strategy
        return _SIMPLEST.index(name) if name in _SIMPLEST else len(_SIMPLEST)

    remaining = sorted(possible, key=lambda c: c.step_s)
    ordered: list[Candidate] = []
    while remaining:
        limit = remaining[0].step_s / _WORTH_IT
        close = [c for c in remaining if c.step_s <= limit]
        chosen = min(close, key=lambda c: (c.workers + c.servers, place(c), c.step_s))
        ordered.append(chosen)
        remaining.remove(chosen)
    return ordered


def _reason(
    load: Workload,
    best: Candidate | None,
    second: Candidate | None,
    all_candidates: list[Candidate],
) -> str:
    if best is None:
        least = min(
            (c for c in all_candidates if c.memory),
            key=lambda c: c.memory_bytes / (c.limit or 1),
        )
        return (
            f"No strategy fits. The nearest is {name_of(least)}, which needs "
            f"{page.size(least.memory_bytes)} of {page.size(least.limit)}."
        )
    alone = next(c for c in all_candidates if c.strategy == "single")
    if load.indivisible is not None:
        return (
            f"Replicas cannot share a batch, because {load.indivisible}: more of them compute "
            "the same, and are no faster."
        )
    if best.strategy == "single":
        if second is None:
            return "It is the only one that can run here and gives the result of one process."
        return (
            f"A step takes {page.milliseconds(best.step_s)} in one process. On "
            f"{name_of(second)} it would take {page.milliseconds(second.step_s)}, of "
            f"which communication is "
            f"{page.milliseconds(second.communication_s)}."
        )
    if alone.obstacle is not None or not alone.fits:
        why = alone.obstacle or (
            f"one device has {page.size(alone.limit)}, and single needs "
            f"{page.size(alone.memory_bytes)}"
        )
        return f"It is the fastest of those that can run here and fit, as {why}."
    return (
        f"A step takes {page.milliseconds(best.step_s)} instead of "
        f"{page.milliseconds(alone.step_s)} in one process: {alone.step_s / best.step_s:.3g} "
        f"times as fast on {best.workers}."
    )


def name_of(candidate: Candidate) -> str:
    """Returns a candidate's name with its number of workers.

    Args:
        candidate: The candidate.

    Example:
        >>> name_of(Candidate("multi_worker", 4))
        'multi_worker on 4'
    """
    if candidate.workers == 1:
        return candidate.strategy
    return f"{candidate.strategy} on {candidate.workers}"


def command(candidate: Candidate, script: str) -> str:
    """Returns the command that trains with a candidate.

    Args:
        candidate: The candidate.
        script: The script, with its arguments.

    Example:
        >>> command(Candidate("zero 1", 2), "train.py")
        'tfdist run -n 2 --zero 1 train.py'
    """
    workers, hosts = candidate.workers, candidate.hosts
    count = [f"-n {workers}"]
    if hosts > 1:
        local = workers // hosts
        names = ",".join(f"host{i + 1}:{local}" for i in range(hosts))
        count = [f"--hosts {names} --node-rank I"]
    options = {
        "multi_worker": count,
        "horovod": ["--strategy horovod", *count],
        "zero 1": [*count, "--zero 1"],
        "zero 3": [*count, "--zero 3"],
        "parameter_server": [*count, f"--ps {candidate.servers}", "--synchronous"],
    }.get(candidate.strategy)
    if options is None:
        in_code = {
            "model parallel": 'strategy=tfdist.ModelParallel("auto")',
            "pipeline": f"strategy=tfdist.Pipeline(stages={workers})",
        }.get(candidate.strategy)
        return f"python {script}" + (f"    # with {in_code} in fit" if in_code else "")
    return " ".join(["tfdist run", *options, script])
