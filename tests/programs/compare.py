"""How far what two runs left behind is apart."""

from __future__ import annotations

import numpy as np

from tests.programs.run import Left

TOLERANCE = 1e-4


def differences(received: Left, expected: Left, tolerance: float = TOLERANCE) -> dict[str, str]:
    """Gives what differs, by name: a distance relative to what was expected, or its shape."""
    found = {}
    for name in sorted({*received, *expected}):
        if name not in expected or name not in received:
            found[name] = "is only in one"
            continue
        here, there = (np.asarray(one[name], np.float64) for one in (received, expected))
        if here.shape != there.shape:
            found[name] = f"shape {here.shape}, not {there.shape}"
            continue
        distance = np.linalg.norm(here - there)
        if not distance <= tolerance * np.linalg.norm(there):
            found[name] = f"{distance / np.linalg.norm(there):.1e}"
    return found
