"""Notices that nothing goes on any more, says why, and ends the run. Needs no TensorFlow."""

from tfdist.watch.progress import here
from tfdist.watch.settings import HANG_LIMIT, ON_HANG
from tfdist.watch.watcher import calling, configure, meet

__all__ = ["HANG_LIMIT", "ON_HANG", "calling", "configure", "here", "meet"]
