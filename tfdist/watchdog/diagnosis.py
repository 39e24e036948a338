"""Finds the cause of a hang from the workers' status messages, and writes the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfdist.watchdog.messages import ENDED, StatusMessage
from tfdist.watchdog.progress import BETWEEN, FIRST_STEP, OUTSIDE, START, STEP

HEADLINE = "tfdist: the run hangs"
"""The beginning of a report; the launcher searches for it."""


@dataclass(frozen=True)
class LostWorker:
    """A worker whose watcher does not answer.

    Attributes:
        seconds: For how many seconds it has not answered.
        state: The state of its process, a letter as in `ps`; None if the process has ended,
            and "?" if it is on another machine.
    """

    seconds: float
    state: str | None = "?"


@dataclass(frozen=True)
class HangCause:
    """Why a run hangs.

    Attributes:
        text: The cause and the remedy.
        certain: Whether the run cannot go on, however long it waits.
    """

    text: str
    certain: bool = False


def goes_on(
    statuses: Mapping[int, StatusMessage],
    lost: Mapping[int, LostWorker],
    silent: Sequence[str] = (),
) -> bool:
    """Returns whether a worker for which the others wait is still within its own limit.

    Args:
        statuses: The last status of each worker.
        lost: The workers that do not answer.
        silent: The servers that do not answer.
    """
    if any(cause.certain for cause in causes(statuses, lost, silent)):
        return False
    answering = [status for worker, status in statuses.items() if worker not in lost]
    return any(
        status.is_debugged or (not status.is_overdue and status.at not in (OUTSIDE, ENDED))
        for status in answering
    )


def causes(
    statuses: Mapping[int, StatusMessage],
    lost: Mapping[int, LostWorker],
    silent: Sequence[str] = (),
) -> list[HangCause]:
    """Lists the likely causes, the likeliest first.

    Args:
        statuses: The last status of each worker.
        lost: The workers that do not answer.
        silent: The servers that do not answer.
    """
    likely = [
        HangCause(
            f"{task} does not answer, though it may run: its process is stopped (SIGSTOP, or a "
            "debugger), its machine stands still, or the network to it is cut.",
            certain=True,
        )
        for task in silent
    ]
    likely += [_lost(statuses[w], reason) for w, reason in lost.items() if w in statuses]
    answering = [status for worker, status in sorted(statuses.items()) if worker not in lost]
    inside = [status for status in answering if status.is_inside]
    likely += _calls(answering, inside)
    likely += [
        HangCause(
            f"{status.task} is almost out of memory: {status.left_mib} MiB are left of "
            f"{status.all_mib}, and it uses {status.used_mib}. A machine that swaps stands "
            "still; make the batch or the shuffle buffer smaller, or start fewer workers on it."
        )
        for status in answering
        if status.lacks_memory
    ]
    likely += [
        HangCause(
            f"{status.task} waits for its data, for {status.idle:.0f} s"
            + (": the others wait for it. " if len(inside) > 1 else ". ")
            + "Look at what its pipeline reads (a slow disk or network, a "
            "generator that waits, a shuffle buffer that fills)."
        )
        for status in answering
        if status.waits_for_data
    ]
    likely += [
        HangCause(
            f"The step waits for its data, or computes, for {status.idle:.0f} s. Look at what "
            "the pipeline reads (a slow disk or network, a generator that waits, a shuffle "
            "buffer that fills)."
        )
        for status in answering
        if status.alone and status.at in (STEP, FIRST_STEP) and status.is_overdue
    ]
    likely += _elsewhere(answering, inside)
    if not likely:
        likely.append(
            HangCause(
                "No known cause. All workers are in the same step. The network between them "
                "may be cut. If a step is that slow, raise the limit."
                if len(inside) > 1
                else "No known cause. The Python stack above shows where it waits."
            )
        )
    return likely


def _lost(status: StatusMessage, reason: LostWorker) -> HangCause:
    since = f"{status.task} has not answered for {reason.seconds:.0f} s"
    if reason.state in ("T", "t"):
        text = (
            f"{since}: its process {status.pid} is stopped (SIGSTOP, or a debugger). "
            f"`kill -CONT {status.pid}` lets it go on, if the others still wait."
        )
        return HangCause(text, certain=True)
    if reason.state in (None, "Z", "X"):
        text = f"{since}: its process {status.pid} has ended. See the end of its output."
        return HangCause(text, certain=True)
    if reason.state != "?":
        return HangCause(
            f"{since}, but its process {status.pid} runs: something holds Python's interpreter "
            "lock, such as a library that computes for long, or its machine is overloaded."
        )
    return HangCause(
        f"{since}: its process {status.pid} on {status.host} is stopped, has ended or cannot "
        "be reached. See its output, the machine and the network between them."
    )


def ended(status: StatusMessage, inside: Sequence[StatusMessage]) -> HangCause:
    """Makes the cause for a worker whose script has ended.

    Args:
        status: The last status of that worker.
        inside: The status of each worker that is in a call.
    """
    return HangCause(
        f"The script of {status.task} has ended, after {_times(status.number)}, while "
        f"{_tasks(inside)} is in `{inside[0].call}`, call number {inside[0].number}. All "
        "workers must call `fit`, `evaluate` and `predict` equally often: look for "
        "`if tfdist.is_chief():` around one, and for loops of different lengths.",
        certain=True,
    )


def _calls(
    answering: Sequence[StatusMessage], inside: Sequence[StatusMessage]
) -> list[HangCause]:
    """Finds workers that are not in the same call as the others."""
    # Workers in a call count only if they have waited too long. Otherwise the others may still
    # come to the same call.
    in_call = [n for n in inside if n.at != START and n.is_waiting and n.is_overdue]
    likely = []
    for status in answering:
        if status.at == ENDED and any(other.is_waiting for other in inside):
            likely.append(ended(status, inside))
        elif in_call and not status.is_inside and not status.alone:
            likely.append(
                HangCause(
                    f"{status.task} has left `{status.call}`, in which {_tasks(in_call)} goes "
                    f"on: it returned early, after step {status.step}. Look for an exception "
                    "that the script catches, and for a callback that stops one worker by "
                    "other means than `model.stop_training`.",
                    certain=True,
                )
                if status.number == in_call[0].number
                else HangCause(
                    f"{status.task} is not in `{in_call[0].call}`, where {_tasks(in_call)} is: "
                    f"it has made {_times(status.number)}, and they {in_call[0].number}. All "
                    "workers must make the same calls.",
                    certain=True,
                )
            )
    apart = [n for n in inside if n.is_exchanging and n.at == BETWEEN and n.is_overdue]
    if apart and any(status.at == STEP for status in in_call):
        in_step = [status for status in in_call if status.at == STEP]
        likely.append(
            HangCause(
                f"The data of {_tasks(apart)} has ended before step {in_step[0].step}, in "
                f"which {_tasks(in_step)} waits. Generators, PyDatasets and data sets must "
                "have equally many batches on all workers.",
                certain=True,
            )
            if apart[0].ends_epoch
            else HangCause(
                f"{_tasks(apart)} exchanges something with the others in a callback "
                f"({apart[0].phase}), while {_tasks(in_step)} is in a step. A callback that "
                "calls tfdist must do so on all workers.",
                certain=True,
            )
        )
    names = {status.call for status in inside}
    numbers = {status.number for status in inside}
    if in_call and (len(names) > 1 or len(numbers) > 1):
        listed = ", ".join(
            f"{status.task} is in `{status.call}` (call {status.number})" for status in inside
        )
        likely.append(
            HangCause(
                f"The workers called different functions, or the same a different number of "
                f"times: {listed}. All workers must make the same calls in the same order.",
                certain=True,
            )
        )
    return likely


def _elsewhere(
    answering: Sequence[StatusMessage], inside: Sequence[StatusMessage]
) -> list[HangCause]:
    """Finds workers that do something else while the others wait in a step."""
    waiting = [status for status in inside if status.is_waiting]
    likely = []
    for status in answering:
        if status.at == BETWEEN and not status.is_waiting and status.is_overdue:
            likely.append(
                HangCause(
                    f"{status.task} has been in {status.phase} for {status.idle:.0f} s"
                    + (f", and {_tasks(waiting)} waits for it. " if waiting else ". ")
                    + "If that is right, raise the limit; a callback that calls tfdist or "
                    "waits for other workers must run on all of them."
                )
            )
        elif status.at == OUTSIDE and inside and status.number < inside[0].number:
            likely.append(
                HangCause(
                    f"{status.task} has not called `{inside[0].call}` yet, where "
                    f"{_tasks(inside)} waits for it. If it saves or computes something "
                    "meanwhile, raise the limit."
                )
            )
    steps = {status.step for status in waiting}
    if len(steps) > 1:
        slowest = min(waiting, key=lambda status: status.step)
        likely.append(
            HangCause(
                f"{slowest.task} is behind, in step {slowest.step}: see where its Python "
                "stands."
            )
        )
    return likely


def report(
    statuses: Mapping[int, StatusMessage],
    lost: Mapping[int, LostWorker],
    missing: Sequence[str] = (),
    silent: Sequence[str] = (),
    ending: str = "",
) -> str:
    """Writes the report.

    Args:
        statuses: The last status of each worker.
        lost: The workers that do not answer.
        missing: The tasks that never sent a status.
        silent: The servers that do not answer.
        ending: A sentence on what happens now.
    """
    overdue = [n for w, n in statuses.items() if w not in lost and n.is_overdue]
    longest = max((n.idle for n in overdue), default=0.0)
    limit = max((n.limit for n in overdue), default=0.0)
    lines = [
        f"{HEADLINE}: nothing has gone on for {longest:.0f} s (the limit is {limit:.0f} s)."
        if overdue
        else f"{HEADLINE}: an exchange was broken off, since a worker does not answer."
    ]
    width = max((len(n.task) for n in statuses.values()), default=0)
    for worker, status in sorted(statuses.items()):
        state = f"{status.phase}, for {status.idle:.0f} s"
        if worker in lost:
            state = f"does not answer, for {lost[worker].seconds:.0f} s; it was {status.phase}"
        lines.append(f"  {status.task:<{width}}  {state}")
        if worker not in lost:
            lines += [f"  {'':<{width}}    {line}" for line in status.stack]
    lines += [f"  {task}  has sent no status" for task in missing]
    for number, cause in enumerate(causes(statuses, lost, silent)):
        lines.append(f"  {'Or' if number else 'Likely cause'}: {cause.text}")
    return "\n".join([*lines, *([f"  {ending}"] if ending else [])])


def _times(number: int) -> str:
    return f"{number} call{'' if number == 1 else 's'}"


def _tasks(statuses: Sequence[StatusMessage]) -> str:
    if len(statuses) > 3:
        return f"{statuses[0].task} with {len(statuses) - 1} others"
    return " and ".join(status.task for status in statuses)
