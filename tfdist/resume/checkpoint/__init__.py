"""Checkpoints: a training continues from one as if it had never stopped."""

from tfdist.resume.checkpoint.run import CheckpointRun
from tfdist.resume.checkpoint.settings import Checkpoint

__all__ = ["Checkpoint", "CheckpointRun"]
