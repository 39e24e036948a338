"""TensorFlow's runtime of this process: its devices, its cluster, its key-value store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as _context
from tensorflow.python.framework import config as _config

EagerTensor: Any = tf.__internal__.EagerTensor
"""The class of tensors that hold numbers; `tf.Tensor` is that of symbolic ones, too."""


def has_devices() -> bool:
    """Tells whether TensorFlow has made its devices: then no cluster can be joined."""
    return bool(_context.context()._initialized)


def is_deterministic() -> bool:
    """Tells whether `tf.config.experimental.enable_op_determinism` was called."""
    return bool(_config.is_op_determinism_enabled())


def key_value_store() -> Any:
    """Gives what has `get_config_key_value` and others; None where nothing connects workers."""
    context = _context.context()
    return None if context.coordination_service is None else context


def configure_coordination(jobs: Mapping[str, int], leader: str, seconds: float) -> None:
    """Sets how TensorFlow waits for a cluster, before it is joined.

    MultiWorkerMirroredStrategy leaves an existing configuration alone; its own waits for a
    worker that never comes for an hour.

    Args:
        jobs: How many tasks each has.
        leader: The job whose task 0 keeps the service.
        seconds: How long to wait for the others.
    """
    coordinated = _context.coordination_config_pb2.CoordinatedJob
    _context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=f"/job:{leader}/replica:0/task:0",
        cluster_register_timeout_in_ms=int(seconds * 1000),
        # A machine at its limit may be late by seconds, and is not lost for that.
        heartbeat_timeout_in_ms=60_000,
        coordinated_jobs=[coordinated(name=job, num_tasks=n) for job, n in jobs.items()],
    )
