"""What a program leaves behind: its weights and its numbers, where OUTCOME names a folder."""

import os
from pathlib import Path

import numpy as np


def save(models, history=None, **numbers):
    """Writes the weights of a model or several, a `History` or several, and other numbers."""
    folder = os.environ.get("OUTCOME")
    if folder is None:
        return
    arrays = {f"number {name}": np.asarray(value) for name, value in numbers.items()}
    for position, model in enumerate(_several(models)):
        for place, variable in enumerate(model.weights):
            name = f"weight {position}.{place} {variable.path}"
            arrays[name] = np.asarray(variable)
    for position, one in enumerate(_several(history)):
        for name, values in one.history.items():
            arrays[f"history {position} {name}"] = np.asarray(values)
    np.savez(Path(folder) / f"{os.getpid()}.npz", **arrays)


def _several(one):
    if one is None:
        return []
    return one if isinstance(one, list) else [one]
