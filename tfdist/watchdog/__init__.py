"""The watchdog notices a hang, reports its cause and ends the run. It needs no TensorFlow."""

from tfdist.watchdog.calls import calling, configure, meet, tell_end
from tfdist.watchdog.progress import EXCHANGING, SAVING, here
from tfdist.watchdog.settings import HANG_LIMIT, ON_HANG

__all__ = [
    "EXCHANGING",
    "HANG_LIMIT",
    "ON_HANG",
    "SAVING",
    "calling",
    "configure",
    "here",
    "meet",
    "tell_end",
]
