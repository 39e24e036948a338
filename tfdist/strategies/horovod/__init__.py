"""The strategy `horovod`. It uses Horovod's collectives, not its Keras layer."""

from tfdist.strategies.horovod.strategy import Horovod

__all__ = ["Horovod"]
