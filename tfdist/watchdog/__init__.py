"""Notices that nothing goes on any more, says why, and ends the run. Needs no TensorFlow."""

from tfdist.watchdog.progress import EXCHANGING, SAVING, here
from tfdist.watchdog.settings import HANG_LIMIT, ON_HANG
from tfdist.watchdog.watcher import calling, configure, meet

__all__ = [
    "EXCHANGING",
    "HANG_LIMIT",
    "ON_HANG",
    "SAVING",
    "calling",
    "configure",
    "here",
    "meet",
]
