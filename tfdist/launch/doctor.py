"""Examines this machine: its packages and devices, its cluster, the strategies it can run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from tfdist._version import __version__
from tfdist.cluster import Cluster, strategy_names
from tfdist.errors import ClusterError
from tfdist.launch.programs import ask
from tfdist.launch.resources import usable_cores

_PACKAGES = ("tensorflow", "keras", "numpy", "horovod")
_ASK_S = 120.0
# TensorFlow is imported in a process of its own: a broken one must not end the doctor.
_ASK_TENSORFLOW = """
import json
import tensorflow as tf
found = {"tensorflow": tf.__version__, "devices": [], "keras": None, "keras_backend": None}
try:
    import keras
    found["keras"] = keras.__version__
    found["keras_backend"] = keras.backend.backend()
except Exception as error:
    found["keras_error"] = f"{type(error).__name__}: {error}"
try:
    import horovod.tensorflow as hvd
    built = {"Gloo": hvd.gloo_built(), "MPI": hvd.mpi_built(), "NCCL": hvd.nccl_built(),
             "CUDA": hvd.cuda_built(), "ROCm": hvd.rocm_built(), "oneCCL": hvd.ccl_built()}
    found["horovod_operations"] = [name for name, is_built in built.items() if is_built]
except ModuleNotFoundError:
    pass
except Exception as error:
    found["horovod_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
for device in tf.config.list_physical_devices():
    details = tf.config.experimental.get_device_details(device)
    found["devices"].append([device.device_type, device.name, details.get("device_name", "")])
print("tfdist-doctor " + json.dumps(found))
"""


@dataclass(frozen=True)
class Device:
    """A device that TensorFlow lists: its kind (CPU, GPU, TPU), its name and its model."""

    kind: str
    name: str
    model: str = ""


@dataclass(frozen=True)
class Readiness:
    """Whether a strategy can run here.

    Attributes:
        strategy: The strategy's name.
        can_run: Whether it can run.
        reason: Why it cannot, or the devices on which it would run.
    """

    strategy: str
    can_run: bool
    reason: str


@dataclass(frozen=True)
class DoctorReport:
    """The report of `tfdist doctor`.

    Attributes:
        versions: The version of each package, or why there is none.
        devices: The devices that TensorFlow lists.
        cores: How many cores this process may use.
        cluster: The cluster that the environment describes; None if it is malformed.
        cluster_error: What is malformed; empty if nothing is.
        tensorflow_error: Why TensorFlow or Keras cannot be used; empty if they can.
        strategies: Whether each strategy can run.
    """

    versions: Mapping[str, str]
    devices: tuple[Device, ...]
    cores: int
    cluster: Cluster | None
    cluster_error: str
    tensorflow_error: str
    strategies: tuple[Readiness, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether training in one process works and the cluster's description is valid."""
        return not self.tensorflow_error and self.cluster is not None

    def to_json(self) -> dict[str, Any]:
        """Returns the report in types that JSON has."""
        cluster = None
        if self.cluster is not None:
            names = ("job", "index", "source", "launched")
            cluster = {
                "jobs": {job: list(each) for job, each in self.cluster.jobs.items()},
                **{name: getattr(self.cluster, name) for name in names},
            }
        return {
            "is_healthy": self.is_healthy,
            "versions": dict(self.versions),
            "cores": self.cores,
            "devices": [asdict(device) for device in self.devices],
            "cluster": cluster,
            "cluster_error": self.cluster_error,
            "tensorflow_error": self.tensorflow_error,
            "strategies": [asdict(readiness) for readiness in self.strategies],
        }


def examine(environ: Mapping[str, str] = os.environ) -> DoctorReport:
    """Examines this machine.

    Args:
        environ: The environment variables.

    Returns:
        The report.
    """
    cluster, cluster_error = None, ""
    try:
        cluster = Cluster.from_environment(environ)
    except ClusterError as error:
        cluster_error = str(error)
    answer, error_text = _ask_tensorflow(environ)
    backend = answer.get("keras_backend")
    if not error_text and answer.get("keras_error"):
        error_text = (
            "Keras must be importable, with its TensorFlow backend. "
            f"Received: KERAS_BACKEND={environ.get('KERAS_BACKEND')!r}, "
            f"{answer['keras_error']}. "
            "Set KERAS_BACKEND=tensorflow, or change it in ~/.keras/keras.json."
        )
    elif not error_text and backend != "tensorflow":
        error_text = (
            f"Keras must use its TensorFlow backend. Received: backend={backend!r}. "
            "Set KERAS_BACKEND=tensorflow, or change it in ~/.keras/keras.json."
        )
    devices = tuple(Device(*device) for device in answer.get("devices", ()))
    return DoctorReport(
        versions=_versions(answer),
        devices=devices,
        cores=usable_cores(),
        cluster=cluster,
        cluster_error=cluster_error,
        tensorflow_error=error_text,
        strategies=_strategies(answer, devices, cluster, error_text, environ),
    )


def _ask_tensorflow(environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    # tfdist checks TF_CONFIG itself; a malformed one could make TensorFlow fail.
    variables = {"TF_CPP_MIN_LOG_LEVEL": "2", **environ}
    variables.pop("TF_CONFIG", None)
    try:
        process = ask([sys.executable, "-c", _ASK_TENSORFLOW], _ASK_S, variables)
    except subprocess.TimeoutExpired:
        return {}, f"TensorFlow did not start within {_ASK_S:.0f} seconds."
    for line in process.stdout.splitlines():
        if line.startswith("tfdist-doctor "):
            answer: dict[str, Any] = json.loads(line.partition(" ")[2])
            return answer, ""
    last_line = (process.stderr.strip() or "It wrote nothing.").splitlines()[-1]
    if process.returncode < 0:
        last_line = f"It was ended by signal {-process.returncode}. {last_line}"
    return {}, f"TensorFlow cannot be imported. {last_line}"


def _versions(answer: Mapping[str, Any]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "tfdist": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # tensorflow-cpu, tf-nightly and others provide the same module.
            versions[package] = answer.get(package) or "not installed"
    if answer.get("keras_backend"):
        versions["keras"] += f" (backend {answer['keras_backend']})"
    return versions


def _strategies(
    answer: Mapping[str, Any],
    devices: tuple[Device, ...],
    cluster: Cluster | None,
    tensorflow_error: str,
    environ: Mapping[str, str],
) -> tuple[Readiness, ...]:
    if tensorflow_error:
        return tuple(
            Readiness(name, False, tensorflow_error) for name in strategy_names.names()
        )
    gpus = sum(device.kind == "GPU" for device in devices)
    return (
        Readiness("single", True, "one GPU" if gpus else "the processor"),
        _mirrored(gpus),
        _multi_worker(cluster),
        _horovod(answer, cluster),
        _parameter_server(cluster),
        _tpu(devices, environ),
        *(
            Readiness(name, True, f"from the package {package}; it was not checked")
            for name, package in strategy_names.of_other_packages().items()
        ),
    )


def _mirrored(gpus: int) -> Readiness:
    if gpus > 1:
        return Readiness("mirrored", True, f"{gpus} GPUs, one replica on each")
    device = "the only GPU" if gpus else "the processor, as there is no GPU"
    return Readiness("mirrored", True, f"one replica, on {device}: the same as single")


def _multi_worker(cluster: Cluster | None) -> Readiness:
    if cluster is None:
        return Readiness("multi_worker", False, "the cluster's description is malformed")
    if cluster.launched:
        return Readiness("multi_worker", False, f"{cluster.source} gave ranks, no addresses")
    if cluster.has_parameter_servers:
        return Readiness("multi_worker", False, "the cluster has parameter servers")
    if cluster.num_workers > 1:
        return Readiness(
            "multi_worker",
            cluster.job in ("chief", "worker"),
            f"{cluster.task} of {cluster.num_workers}, from {cluster.source}",
        )
    return Readiness("multi_worker", True, "start it with: tfdist run -n 2 train.py")


def _horovod(answer: Mapping[str, Any], cluster: Cluster | None) -> Readiness:
    if "horovod_error" in answer:
        reason = f"it was built for another TensorFlow ({answer['horovod_error']}): "
        return Readiness("horovod", False, reason + "run tfdist horovod build --force")
    if "horovod_operations" not in answer:
        return Readiness("horovod", False, "not installed: run tfdist horovod build")
    operations = f"built with {', '.join(answer['horovod_operations']) or 'no operations'}"
    if cluster is not None and cluster.launched:
        rank = f"rank {cluster.index} of {cluster.launched}, from {cluster.source}"
        return Readiness("horovod", True, f"{rank}; {operations}")
    how = "start it with: tfdist run --strategy horovod -n 2 train.py"
    return Readiness("horovod", bool(answer["horovod_operations"]), f"{operations}; {how}")


def _parameter_server(cluster: Cluster | None) -> Readiness:
    if cluster is None:
        return Readiness("parameter_server", False, "the cluster's description is malformed")
    if cluster.has_parameter_servers:
        missing = [job for job in ("chief", "worker") if not cluster.jobs.get(job)]
        if missing:
            reason = f"{cluster.source} names no {' and no '.join(missing)}"
            return Readiness("parameter_server", False, reason)
        jobs = ", ".join(f"{len(cluster.jobs[job])} {job}" for job in ("worker", "ps"))
        return Readiness("parameter_server", True, f"{cluster.task} beside {jobs}")
    return Readiness("parameter_server", True, "start it with: tfdist run -n 2 --ps 1 train.py")


def _tpu(devices: tuple[Device, ...], environ: Mapping[str, str]) -> Readiness:
    tpus = sum(device.kind == "TPU" for device in devices)
    if tpus:
        return Readiness("tpu", True, f"{tpus} TPU cores")
    name = environ.get("TPU_NAME")
    if name:
        return Readiness("tpu", True, f"TPU_NAME is {name}; it was not contacted")
    return Readiness("tpu", False, "no TPU: TensorFlow lists none, and TPU_NAME is not set")
