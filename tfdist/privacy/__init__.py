"""Differential privacy: what a training run costs, and how its examples are drawn.

The accountant needs neither TensorFlow nor NumPy of its own, so nothing is imported here
before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfdist.privacy.accounting import capacity, epsilon, noise_multiplier
    from tfdist.privacy.ledger import Ledger, Phase
    from tfdist.privacy.poisson import Poisson
    from tfdist.privacy.rebuild import make_private_model
    from tfdist.privacy.report import Report, statement

__all__ = [
    "Ledger",
    "Phase",
    "Poisson",
    "Report",
    "capacity",
    "epsilon",
    "make_private_model",
    "noise_multiplier",
    "statement",
]

_HOMES = {
    "Ledger": "tfdist.privacy.ledger",
    "Phase": "tfdist.privacy.ledger",
    "Poisson": "tfdist.privacy.poisson",
    "Report": "tfdist.privacy.report",
    "capacity": "tfdist.privacy.accounting",
    "epsilon": "tfdist.privacy.accounting",
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
