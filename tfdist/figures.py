"""Pictures, for those who have matplotlib."""

from __future__ import annotations

from typing import Any

from tfdist.errors import MissingPackageError


def new_figure(**options: Any) -> Any:
    """Makes an empty `matplotlib.figure.Figure`, which belongs to no window.

    Args:
        **options: Of the figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "A picture needs matplotlib. Received: an installation without it. "
            'Install it: pip install "tfdist[plot]".'
        ) from None
    return Figure(layout="constrained", **options)
