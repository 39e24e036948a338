"""Processes that Horovod connects: its collectives, never its Keras layer."""

from tfdist.strategies.horovod.strategy import Horovod

__all__ = ["Horovod"]
