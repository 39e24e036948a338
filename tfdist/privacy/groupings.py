"""Random names of groupings of examples, so that a ledger reveals nothing of `group_ids`."""

from __future__ import annotations

import dataclasses
import secrets

from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.model_history import History

_NAMES: dict[str, str] = {}  # the names by fingerprint, of this process


def name_of(users: str) -> str:
    """Returns the name of a grouping, which is the same in each call.

    The name is random, since files and ledgers must not depend on the users in the data.

    Args:
        users: The fingerprint of the grouping.
    """
    return _NAMES.setdefault(users, secrets.token_hex(8))


def comparable(history: History) -> History:
    """Removes the names of groupings of other processes, which cannot be compared here.

    Args:
        history: The history of a model, or of a file.
    """
    # A name is known only in the process that has drawn it.
    names = set(_NAMES.values())
    phases = tuple(
        dataclasses.replace(p, groups=p.groups if p.groups in names else None)
        for p in history.ledger.phases
    )
    return dataclasses.replace(history, ledger=Ledger(phases))
