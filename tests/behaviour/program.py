"""Runs all checks on this worker and writes how each ended.

python -m tests.behaviour.program STRATEGY REPLICAS FOLDER [CHECK ...]
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import keras
import pytest

import tfdist
from tests.behaviour.checkpoint_checks import CHECKPOINT_CHECKS
from tests.behaviour.checks import CHECKS, Check
from tests.behaviour.horovod_checks import HOROVOD_CHECKS
from tests.behaviour.local_checks import LOCAL_CHECKS
from tests.behaviour.privacy_checks import PRIVACY_CHECKS
from tests.behaviour.server_checks import SERVER_CHECKS
from tests.jobs import begin, write

OWN = {
    "multi_worker": LOCAL_CHECKS,
    "horovod": HOROVOD_CHECKS | LOCAL_CHECKS,
    "parameter_server": SERVER_CHECKS,
}


def checks_of(strategy: str) -> dict[str, Check]:
    """Gives what is checked on a strategy by name."""
    return CHECKS | CHECKPOINT_CHECKS | OWN.get(strategy, {})


def main(strategy: str, replicas: str, folder: Path, *names: str) -> None:
    place = begin(strategy, replicas, seed=7).strategy.place
    checks = checks_of(strategy)
    named = checks | PRIVACY_CHECKS
    for name in names or checks:
        tfdist.init(seed=7)
        keras.backend.clear_session()
        shared = folder / name
        shared.mkdir(exist_ok=True)
        try:
            named[name](shared)
            outcome = "passed"
        except pytest.skip.Exception as reason:
            outcome = f"skipped: {reason}"
        except Exception:
            outcome = traceback.format_exc()
        write(outcome, folder / f"{name}.worker-{place.worker_index}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
