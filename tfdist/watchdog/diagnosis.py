"""From what the workers say to why the run hangs, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfdist.watchdog.messages import ENDED, StatusMessage
from tfdist.watchdog.progress import BETWEEN, FIRST_STEP, OUTSIDE, START, STEP

HEADLINE = "tfdist: the run hangs"
"""How a report begins; the launcher looks for it."""


@dataclass(frozen=True)
class Lost:
    """A worker whose watcher does not answer.

    Attributes:
        seconds: Since when.
        state: Of its process, a letter as in `ps`; None if there is none any more, and "?"
            if it is on another machine.
    """

    seconds: float
    state: str | None = "?"


@dataclass(frozen=True)
class HangCause:
    """Why a run hangs.

    Attributes:
        text: What is wrong and what to do.
        certain: Whether it can have no other end, however long one waits.
    """

    text: str
    certain: bool = False


def goes_on(
    notes: Mapping[int, StatusMessage], lost: Mapping[int, Lost], silent: Sequence[str] = ()
) -> bool:
    """Tells whether a worker that the others wait for is still within its own limit.

    Args:
        notes: What each worker said last.
        lost: Those that do not answer.
        silent: Servers that do not answer.
    """
    if any(cause.certain for cause in causes(notes, lost, silent)):
        return False
    answering = [note for worker, note in notes.items() if worker not in lost]
    return any(
        note.is_debugged or (not note.is_overdue and note.at not in (OUTSIDE, ENDED))
        for note in answering
    )


def causes(
    notes: Mapping[int, StatusMessage], lost: Mapping[int, Lost], silent: Sequence[str] = ()
) -> list[HangCause]:
    """Lists the likely causes, the likeliest first.

    Args:
        notes: What each worker said last.
        lost: Those that do not answer.
        silent: Servers that do not answer.
    """
    found = [
        HangCause(
            f"{task} does not answer, though it may run: its process is stopped (SIGSTOP, or a "
            "debugger), its machine stands still, or the network to it is cut.",
            certain=True,
        )
        for task in silent
    ]
    found += [_lost(notes[w], reason) for w, reason in lost.items() if w in notes]
    answering = [note for worker, note in sorted(notes.items()) if worker not in lost]
    inside = [note for note in answering if note.is_inside]
    found += _calls(answering, inside)
    found += [
        HangCause(
            f"{note.task} is almost out of memory: {note.left_mib} MiB are left of "
            f"{note.all_mib}, and it uses {note.used_mib}. A machine that swaps stands still; "
            "make the batch or the shuffle buffer smaller, or start fewer workers on it."
        )
        for note in answering
        if note.lacks_memory
    ]
    found += [
        HangCause(
            f"{note.task} waits for its data, for {note.idle:.0f} s"
            + (": the others wait for it. " if len(inside) > 1 else ". ")
            + "Look at what its pipeline reads (a slow disk or network, a "
            "generator that waits, a shuffle buffer that fills)."
        )
        for note in answering
        if note.waits_for_data
    ]
    found += [
        HangCause(
            f"The step waits for its data, or computes, for {note.idle:.0f} s. Look at what "
            "the pipeline reads (a slow disk or network, a generator that waits, a shuffle "
            "buffer that fills)."
        )
        for note in answering
        if note.alone and note.at in (STEP, FIRST_STEP) and note.is_overdue
    ]
    found += _elsewhere(answering, inside)
    if not found:
        found.append(
            HangCause(
                "Nothing that is known. All workers are in the same step, so the network "
                "between them may be cut, or a step is that slow: raise the limit then."
                if len(inside) > 1
                else "Nothing that is known. See where Python stands."
            )
        )
    return found


def _lost(note: StatusMessage, reason: Lost) -> HangCause:
    since = f"{note.task} has not answered for {reason.seconds:.0f} s"
    if reason.state in ("T", "t"):
        text = (
            f"{since}: its process {note.pid} is stopped (SIGSTOP, or a debugger). "
            f"`kill -CONT {note.pid}` lets it go on, if the others still wait."
        )
        return HangCause(text, certain=True)
    if reason.state in (None, "Z", "X"):
        text = f"{since}: its process {note.pid} has ended. See the end of its output."
        return HangCause(text, certain=True)
    if reason.state != "?":
        return HangCause(
            f"{since}, but its process {note.pid} runs: something holds Python's interpreter "
            "lock, such as a library that computes for long, or its machine is overloaded."
        )
    return HangCause(
        f"{since}: its process {note.pid} on {note.host} is stopped, has ended or cannot be "
        "reached. See its output, the machine and the network between them."
    )


def ended(note: StatusMessage, inside: Sequence[StatusMessage]) -> HangCause:
    """Says what it means that a worker's script has ended.

    Args:
        note: Its last.
        inside: Of those that are in a call.
    """
    return HangCause(
        f"The script of {note.task} has ended, after {_times(note.number)}, while "
        f"{_tasks(inside)} is in `{inside[0].call}`, call number {inside[0].number}. All "
        "workers must call `fit`, `evaluate` and `predict` equally often: look for "
        "`if tfdist.is_chief():` around one, and for loops of different lengths.",
        certain=True,
    )


def _calls(
    answering: Sequence[StatusMessage], inside: Sequence[StatusMessage]
) -> list[HangCause]:
    """Finds workers that are not in the call in which others are."""
    begun = [n for n in inside if n.at != START and n.is_waiting and n.is_overdue]
    found = []
    for note in answering:
        if note.at == ENDED and any(other.is_waiting for other in inside):
            found.append(ended(note, inside))
        elif begun and not note.is_inside and not note.alone:
            found.append(
                HangCause(
                    f"{note.task} has left `{note.call}`, in which {_tasks(begun)} goes on: it "
                    f"returned early, after step {note.step}. Look for an exception that the "
                    "script catches, and for a callback that stops one worker by other means "
                    "than `model.stop_training`.",
                    certain=True,
                )
                if note.number == begun[0].number
                else HangCause(
                    f"{note.task} is not in `{begun[0].call}`, where {_tasks(begun)} is: it "
                    f"has made {_times(note.number)}, and they {begun[0].number}. All "
                    "workers must make the same calls.",
                    certain=True,
                )
            )
    apart = [n for n in inside if n.is_exchanging and n.at == BETWEEN and n.is_overdue]
    if apart and any(note.at == STEP for note in begun):
        in_step = [note for note in begun if note.at == STEP]
        found.append(
            HangCause(
                f"{_tasks(apart)} exchanges something with the others in a callback "
                f"({apart[0].phase}), while {_tasks(in_step)} is in a step. A callback that "
                "calls tfdist must do so on all workers.",
                certain=True,
            )
        )
    names = {note.call for note in inside}
    numbers = {note.number for note in inside}
    if begun and (len(names) > 1 or len(numbers) > 1):
        listed = ", ".join(
            f"{note.task} is in `{note.call}` (call {note.number})" for note in inside
        )
        found.append(
            HangCause(
                f"The workers called different functions, or the same a different number of "
                f"times: {listed}. All workers must make the same calls in the same order.",
                certain=True,
            )
        )
    return found


def _elsewhere(
    answering: Sequence[StatusMessage], inside: Sequence[StatusMessage]
) -> list[HangCause]:
    """Finds workers that are busy with something else than the step of the others."""
    waiting = [note for note in inside if note.is_waiting]
    found = []
    for note in answering:
        if note.at == BETWEEN and not note.is_waiting and note.is_overdue:
            found.append(
                HangCause(
                    f"{note.task} has been in {note.phase} for {note.idle:.0f} s"
                    + (f", and {_tasks(waiting)} waits for it. " if waiting else ". ")
                    + "If that is right, raise the limit; a callback that calls tfdist or "
                    "waits for other workers must run on all of them."
                )
            )
        elif note.at == OUTSIDE and inside and note.number < inside[0].number:
            found.append(
                HangCause(
                    f"{note.task} has not called `{inside[0].call}` yet, where "
                    f"{_tasks(inside)} waits for it. If it saves or computes something "
                    "meanwhile, raise the limit."
                )
            )
    steps = {note.step for note in waiting}
    if len(steps) > 1:
        late = min(waiting, key=lambda note: note.step)
        found.append(
            HangCause(
                f"{late.task} is behind, in step {late.step}: see where its Python stands."
            )
        )
    return found


def report(
    notes: Mapping[int, StatusMessage],
    lost: Mapping[int, Lost],
    missing: Sequence[str] = (),
    silent: Sequence[str] = (),
    ending: str = "",
) -> str:
    """Writes the report.

    Args:
        notes: What each worker said last.
        lost: Those that do not answer.
        missing: Tasks that never said anything.
        silent: Servers that do not answer.
        ending: What is done now.
    """
    overdue = [n for w, n in notes.items() if w not in lost and n.is_overdue]
    longest = max((n.idle for n in overdue), default=0.0)
    limit = max((n.limit for n in overdue), default=0.0)
    lines = [
        f"{HEADLINE}: nothing has gone on for {longest:.0f} s (the limit is {limit:.0f} s)."
        if overdue
        else f"{HEADLINE}: an exchange was broken off, since a worker does not answer."
    ]
    width = max((len(n.task) for n in notes.values()), default=0)
    for worker, note in sorted(notes.items()):
        said = f"{note.phase}, for {note.idle:.0f} s"
        if worker in lost:
            said = f"does not answer, for {lost[worker].seconds:.0f} s; it was {note.phase}"
        lines.append(f"  {note.task:<{width}}  {said}")
        if worker not in lost:
            lines += [f"  {'':<{width}}    {line}" for line in note.stack]
    lines += [f"  {task}  has said nothing" for task in missing]
    for number, cause in enumerate(causes(notes, lost, silent)):
        lines.append(f"  {'Or' if number else 'Likely cause'}: {cause.text}")
    return "\n".join([*lines, *([f"  {ending}"] if ending else [])])


def _times(number: int) -> str:
    return f"{number} call{'' if number == 1 else 's'}"


def _tasks(notes: Sequence[StatusMessage]) -> str:
    if len(notes) > 3:
        return f"{notes[0].task} with {len(notes) - 1} others"
    return " and ".join(note.task for note in notes)
