"""Checkpoints from which a training goes on as if it had never stopped."""

from tfdist.resume.checkpoint.run import CheckpointRun
from tfdist.resume.checkpoint.settings import Checkpoint

__all__ = ["Checkpoint", "CheckpointRun"]
