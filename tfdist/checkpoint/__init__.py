"""Checkpoints from which a training goes on as if it had never stopped."""

from tfdist.checkpoint.run import CheckpointRun
from tfdist.checkpoint.settings import Checkpoint

__all__ = ["Checkpoint", "CheckpointRun"]
