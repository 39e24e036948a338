"""TensorFlow's own checkpoints: where all of them are written."""

from __future__ import annotations

from tensorflow.python.checkpoint import checkpoint as _checkpoint

# `save` and `write` of `tf.train.Checkpoint` and `CheckpointManager` come to its `save`.
CheckpointSaver = _checkpoint.TrackableSaver
