"""Names of groupings of examples: of `group_ids` a ledger must say nothing else."""

from __future__ import annotations

import dataclasses
import secrets

from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.model_history import History

_NAMES: dict[str, str] = {}  # of those that this process has seen


def name_of(users: str) -> str:
    """Gives the name of a grouping, the same each time.

    It is random: what a file or a ledger says must not depend on who is in the data.

    Args:
        users: The fingerprint of the grouping.
    """
    return _NAMES.setdefault(users, secrets.token_hex(8))


def known(history: History) -> History:
    """Leaves out names that only another process could compare.

    Args:
        history: Of a model, or of a file.
    """
    names = set(_NAMES.values())
    phases = tuple(
        dataclasses.replace(p, groups=p.groups if p.groups in names else None)
        for p in history.ledger.phases
    )
    return dataclasses.replace(history, ledger=Ledger(phases))
