"""Distributed training for Keras 3 on TensorFlow: the same training, wherever it runs."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from tfdist._version import __version__

if TYPE_CHECKING:
    from tfdist import compression, flower, imbalance, privacy, samplers
    from tfdist.api import fit
    from tfdist.compression.settings import PowerSGD
    from tfdist.data import Augment, ByClass, LocalShard
    from tfdist.federated.secure_sum import SecureSum
    from tfdist.federated.settings import DiLoCo, FedAvg
    from tfdist.privacy.budget import PrivacyBudget
    from tfdist.privacy.client_dp import ClientDP
    from tfdist.privacy.client_dpftrl import ClientDPFTRL
    from tfdist.privacy.dpftrl import DPFTRL
    from tfdist.privacy.settings import DPSGD
    from tfdist.resume.checkpoint import Checkpoint
    from tfdist.scripts.drop_in import drop_in
    from tfdist.scripts.notebook import notebook_launcher
    from tfdist.scripts.recommend import recommend
    from tfdist.sharding.deferred import deferred_weights
    from tfdist.sharding.layout_map import layout_map
    from tfdist.sharding.memory import memory
    from tfdist.sharding.pipeline.strategy import Pipeline
    from tfdist.step.recompute import recompute
    from tfdist.strategies.model_parallel import ModelParallel
    from tfdist.strategies.session import init, is_chief
    from tfdist.strategies.zero import Zero
    from tfdist.training.evaluation import evaluate, predict

__all__ = [
    "DPFTRL",
    "DPSGD",
    "Augment",
    "ByClass",
    "Checkpoint",
    "ClientDP",
    "ClientDPFTRL",
    "DiLoCo",
    "FedAvg",
    "Horovod",
    "LearningRateScaling",
    "LearningRateWarmup",
    "LocalShard",
    "ModelParallel",
    "ParameterServer",
    "PerClassMetrics",
    "Pipeline",
    "PowerSGD",
    "PrivacyBudget",
    "SecureSum",
    "Zero",
    "__version__",
    "compression",
    "deferred_weights",
    "drop_in",
    "evaluate",
    "fit",
    "flower",
    "imbalance",
    "init",
    "is_chief",
    "layout_map",
    "memory",
    "notebook_launcher",
    "placement",
    "predict",
    "privacy",
    "recommend",
    "recompute",
    "samplers",
]

# TensorFlow takes seconds to import; `tfdist --help` should not wait for it.
_HOMES = {
    "Augment": "tfdist.data",
    "ByClass": "tfdist.data",
    "Checkpoint": "tfdist.resume.checkpoint.settings",
    "ClientDP": "tfdist.privacy.client_dp",
    "ClientDPFTRL": "tfdist.privacy.client_dpftrl",
    "DPFTRL": "tfdist.privacy.dpftrl",
    "DPSGD": "tfdist.privacy.settings",
    "DiLoCo": "tfdist.federated.settings",
    "FedAvg": "tfdist.federated.settings",
    "Horovod": "tfdist.strategies.horovod",
    "LearningRateScaling": "tfdist.training.learning_rate",
    "LearningRateWarmup": "tfdist.training.learning_rate",
    "LocalShard": "tfdist.data",
    "ParameterServer": "tfdist.strategies.parameter_server",
    "PerClassMetrics": "tfdist.data.imbalance.per_class",
    "Pipeline": "tfdist.sharding.pipeline.strategy",
    "PowerSGD": "tfdist.compression.settings",
    "PrivacyBudget": "tfdist.privacy.budget",
    "SecureSum": "tfdist.federated.secure_sum",
    "Zero": "tfdist.strategies.zero",
    "ModelParallel": "tfdist.strategies.model_parallel",
    "deferred_weights": "tfdist.sharding.deferred",
    "drop_in": "tfdist.scripts.drop_in",
    "evaluate": "tfdist.training.evaluation",
    "fit": "tfdist.api",
    "init": "tfdist.strategies.session",
    "is_chief": "tfdist.strategies.session",
    "layout_map": "tfdist.sharding.layout_map",
    "memory": "tfdist.sharding.memory",
    "notebook_launcher": "tfdist.scripts.notebook",
    "placement": "tfdist.sharding.placement",
    "predict": "tfdist.training.evaluation",
    "recommend": "tfdist.scripts.recommend",
    "recompute": "tfdist.step.recompute",
}


class _AfterKeras(importlib.abc.MetaPathFinder):
    """Lets model files say what was spent on them, once this process can read one."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "keras":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("keras")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _follow_files()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _follow_files() -> None:
    if "keras" not in sys.modules:
        sys.meta_path.insert(0, _AfterKeras())
        return
    backend = getattr(sys.modules["keras"], "backend", None)
    if backend is not None and backend.backend() == "tensorflow":
        importlib.import_module("tfdist.privacy.model_history")


def __getattr__(name: str) -> Any:
    if name in ("compression", "flower", "imbalance", "privacy", "samplers"):
        return importlib.import_module(f"tfdist.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tfdist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


_follow_files()
