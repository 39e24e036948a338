"""Differential privacy: what a training run costs, draws and gives away.

The accountant needs neither TensorFlow nor NumPy of its own, so nothing is imported here
before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfdist.privacy.accounting import capacity, epsilon, noise_multiplier
    from tfdist.privacy.adam import DPAdam
    from tfdist.privacy.auditing import Canaries, audit, canaries
    from tfdist.privacy.bounds import epsilon_lower_bound
    from tfdist.privacy.ledger import Ledger, Phase
    from tfdist.privacy.likeness import PoissonLike
    from tfdist.privacy.membership import AuditReport
    from tfdist.privacy.poisson import Poisson
    from tfdist.privacy.rebuild import make_private_model
    from tfdist.privacy.report import Report, statement
    from tfdist.privacy.thresholds import ThresholdAttack
    from tfdist.privacy.tradeoffs import gaussian_lower_bound
    from tfdist.privacy_check import CheckReport, check

__all__ = [
    "AuditReport",
    "Canaries",
    "CheckReport",
    "DPAdam",
    "Ledger",
    "Phase",
    "Poisson",
    "PoissonLike",
    "Report",
    "ThresholdAttack",
    "audit",
    "canaries",
    "capacity",
    "check",
    "epsilon",
    "epsilon_lower_bound",
    "gaussian_lower_bound",
    "make_private_model",
    "noise_multiplier",
    "statement",
]

_HOMES = {
    "AuditReport": "tfdist.privacy.membership",
    "Canaries": "tfdist.privacy.auditing",
    "CheckReport": "tfdist.privacy_check",
    "DPAdam": "tfdist.privacy.adam",
    "Ledger": "tfdist.privacy.ledger",
    "Phase": "tfdist.privacy.ledger",
    "Poisson": "tfdist.privacy.poisson",
    "PoissonLike": "tfdist.privacy.likeness",
    "Report": "tfdist.privacy.report",
    "ThresholdAttack": "tfdist.privacy.thresholds",
    "audit": "tfdist.privacy.auditing",
    "canaries": "tfdist.privacy.auditing",
    "capacity": "tfdist.privacy.accounting",
    "check": "tfdist.privacy_check",
    "epsilon": "tfdist.privacy.accounting",
    "epsilon_lower_bound": "tfdist.privacy.bounds",
    "gaussian_lower_bound": "tfdist.privacy.tradeoffs",
    "make_private_model": "tfdist.privacy.rebuild",
    "noise_multiplier": "tfdist.privacy.accounting",
    "statement": "tfdist.privacy.report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tfdist.privacy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
