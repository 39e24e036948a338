"""Differential privacy: private training, accounting, sampling and audits.

The accountant needs no TensorFlow, so each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfdist.privacy.accounting.dp_sgd import capacity, epsilon, noise_multiplier
    from tfdist.privacy.accounting.ledger import Ledger, Phase
    from tfdist.privacy.accounting.report import Report, statement
    from tfdist.privacy.audit_scores.bounds import epsilon_lower_bound
    from tfdist.privacy.audit_scores.membership import AuditReport
    from tfdist.privacy.audit_scores.thresholds import ThresholdAttack
    from tfdist.privacy.audit_scores.tradeoffs import gaussian_lower_bound
    from tfdist.privacy.audits import Canaries, audit, canaries
    from tfdist.privacy.checking import CheckReport, check
    from tfdist.privacy.mechanism.adam import DPAdam
    from tfdist.privacy.private_model import make_private_model
    from tfdist.privacy.sampling.poisson import Poisson
    from tfdist.privacy.sampling.rates import PoissonLike

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
    "AuditReport": "tfdist.privacy.audit_scores.membership",
    "Canaries": "tfdist.privacy.audits",
    "CheckReport": "tfdist.privacy.checking",
    "DPAdam": "tfdist.privacy.mechanism.adam",
    "Ledger": "tfdist.privacy.accounting.ledger",
    "Phase": "tfdist.privacy.accounting.ledger",
    "Poisson": "tfdist.privacy.sampling.poisson",
    "PoissonLike": "tfdist.privacy.sampling.rates",
    "Report": "tfdist.privacy.accounting.report",
    "ThresholdAttack": "tfdist.privacy.audit_scores.thresholds",
    "audit": "tfdist.privacy.audits",
    "canaries": "tfdist.privacy.audits",
    "capacity": "tfdist.privacy.accounting.dp_sgd",
    "check": "tfdist.privacy.checking",
    "epsilon": "tfdist.privacy.accounting.dp_sgd",
    "epsilon_lower_bound": "tfdist.privacy.audit_scores.bounds",
    "gaussian_lower_bound": "tfdist.privacy.audit_scores.tradeoffs",
    "make_private_model": "tfdist.privacy.private_model",
    "noise_multiplier": "tfdist.privacy.accounting.dp_sgd",
    "statement": "tfdist.privacy.accounting.report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tfdist.privacy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
