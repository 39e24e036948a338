"""The class by which TensorFlow writes all its checkpoints."""

from __future__ import annotations

from tensorflow.python.checkpoint import checkpoint as _checkpoint

# `save` and `write` of `tf.train.Checkpoint` and `CheckpointManager` call its `save`.
CheckpointSaver = _checkpoint.TrackableSaver
