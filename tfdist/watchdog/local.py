"""The status of this process, which its watcher sends to the other workers."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from tfdist.watchdog import memory, stacks
from tfdist.watchdog.messages import ENDED, StatusMessage
from tfdist.watchdog.progress import (
    BETWEEN,
    EXCHANGING,
    FIRST_STEP,
    OUTSIDE,
    SAVING,
    STEP,
    here,
)
from tfdist.watchdog.settings import WatchdogSettings


class LocalStatus:
    """Makes the numbered status messages of this process."""

    def __init__(self) -> None:
        self._beat = 0
        self._exchange_since: float | None = None  # the beginning of the present exchange

    def now(
        self, worker: int, settings: WatchdogSettings, with_stack: bool = False
    ) -> StatusMessage:
        """Makes a message with the present status.

        Args:
            worker: This worker's number.
            settings: The limits.
            with_stack: Whether to add the Python stacks.
        """
        frame = stacks.main_frame()
        current_time = time.monotonic()
        at, since, call = here.at, here.since, here.call
        exchanging = at != STEP and here.doing == EXCHANGING
        if not exchanging:
            self._exchange_since = None
        elif self._exchange_since is None:
            self._exchange_since = current_time
        if exchanging and at == BETWEEN:
            since = max(since, self._exchange_since or since)
        # An exchange only waits for other workers, which have their own limits: a step's
        # limit is enough for it.
        limit_at = STEP if exchanging and at == BETWEEN else at
        limit = 0.0 if at == OUTSIDE else settings.limit_of(limit_at, here.median)
        idle = current_time - since
        late = idle > limit / 2 or with_stack
        for_data = late and here.waits_for_data
        memory_left = memory.left_mib() or (None, None)
        stack = [*stacks.describe(frame), *stacks.other_threads()] if with_stack else []
        self._beat += 1
        return StatusMessage(
            worker=worker,
            task=f"worker {worker}",
            beat=self._beat,
            clock=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            call=None if call is None else call.name,
            number=here.calls,
            alone=call is not None and call.alone,
            step=0 if call is None else call.step,
            at=at,
            phase=_phase(frame, at, call, for_data, exchanging),
            idle=idle,
            limit=limit,
            waits_for_data=for_data,
            is_exchanging=exchanging,
            ends_epoch=at == BETWEEN and _ends_epoch(stacks.callback(frame)),
            is_debugged=late and (here.traced or stacks.is_debugged(frame)),
            used_mib=memory.used_mib(),
            left_mib=memory_left[0],
            all_mib=memory_left[1],
            stack=tuple(stack),
        )

    def ended(self, worker: int) -> StatusMessage:
        """Makes the message that this process's script has ended.

        Args:
            worker: This worker's number.
        """
        return StatusMessage(
            worker=worker,
            task=f"worker {worker}",
            beat=self._beat + 1,
            clock=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            call=None if here.call is None else here.call.name,
            number=here.calls,
            step=0 if here.call is None else here.call.step,
            at=ENDED,
            phase="at the end of its script",
        )


def _ends_epoch(callback: tuple[str, bool] | None) -> bool:
    """Returns whether a callback of tfdist's own is running at the end of an epoch."""
    return callback is not None and callback[1] and callback[0].endswith(".on_epoch_end")


def _phase(frame: Any, at: str, call: Any, for_data: bool, exchanging: bool) -> str:
    if call is None:
        return "before its first call"
    if at == OUTSIDE:
        return f"outside of tfdist, after `{call.name}` and its step {call.step}"
    where = f"`{call.name}`, "
    after = f"after step {call.step}" if call.step else "before its first step"
    callback = stacks.callback(frame)
    if here.doing == SAVING:
        return f"{where}{after}: saving a checkpoint"
    if _ends_epoch(callback) and at == BETWEEN:
        return f"{where}at the end of its epoch"
    if callback is not None and at == BETWEEN:
        return f"{where}{after}: in {callback[0]}"
    if exchanging:
        return f"{where}{after}: exchanging settings with the others"
    kind = "validation, after step" if call.validating else "step"
    if at in (STEP, FIRST_STEP):
        other = "its data" if call.alone else "the others"
        doing = "waiting for its data" if for_data else f"computing, or waiting for {other}"
        return f"{where}{kind} {call.step}: {doing}"
    if at == BETWEEN:
        return f"{where}{after}"
    return f"{where}preparing it"
