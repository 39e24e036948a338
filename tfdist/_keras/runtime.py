"""TensorFlow's runtime in this process: devices, cluster, key-value store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as _context
from tensorflow.python.framework import config as _config

EagerTensor: Any = tf.__internal__.EagerTensor
"""The class of tensors with values. `tf.Tensor` includes symbolic tensors."""


def has_devices() -> bool:
    """Returns whether TensorFlow has created its devices. Then it cannot join a cluster."""
    return bool(_context.context()._initialized)


def is_deterministic() -> bool:
    """Returns whether `tf.config.experimental.enable_op_determinism` was called."""
    return bool(_config.is_op_determinism_enabled())


def key_value_store() -> Any:
    """Returns the object with `get_config_key_value`, or None if nothing connects workers."""
    context = _context.context()
    return None if context.coordination_service is None else context


def configure_coordination(jobs: Mapping[str, int], leader: str, seconds: float) -> None:
    """Configures how long TensorFlow waits for the other workers when it joins a cluster.

    MultiWorkerMirroredStrategy uses an existing configuration. Its default waits an hour for a
    worker that never starts.

    Args:
        jobs: Number of tasks of each job.
        leader: The job whose task 0 runs the coordination service.
        seconds: How long to wait for the other workers.
    """
    coordinated = _context.coordination_config_pb2.CoordinatedJob
    _context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=f"/job:{leader}/replica:0/task:0",
        cluster_register_timeout_in_ms=int(seconds * 1000),
        # An overloaded machine may be late by many seconds.
        heartbeat_timeout_in_ms=60_000,
        coordinated_jobs=[coordinated(name=job, num_tasks=n) for job, n in jobs.items()],
    )


def without_retracing_warning(function: Any) -> Any:
    """Switches off TensorFlow's warning that a function is traced often, and returns it.

    The warning counts the traces of all functions with the same code, so several models would
    cause it, and advises users to change a `tf.function` that is not theirs.

    Args:
        function: A result of `tf.function`.
    """
    function._omit_frequent_tracing_warning = True
    return function
