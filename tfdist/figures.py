"""Pictures, for those who have matplotlib, and tables of terminals and notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
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


def text_table(rows: Sequence[Sequence[str]], num_left: int = 0) -> str:
    """Returns a table as text, such that columns have the width of their longest cell.

    Args:
        rows: The text of each cell, row by row.
        num_left: Number of columns, the first ones, that begin at the left. The cells of
            the others end at the right.

    Example:
        >>> print(text_table([["a", "1"], ["bb", "10"]], num_left=1))
        a    1
        bb  10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], above: str = "", below: str = ""
) -> str:
    """Returns a table in HTML, as notebooks show it.

    Args:
        columns: The names of the columns.
        rows: The text of each cell.
        above: Lines before the table.
        below: Lines after it.

    Example:
        >>> "<td>&lt;1&gt;</td>" in html_table(["a"], [["<1>"]])
        True
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{_paragraph(above)}{table}{_paragraph(below)}"


def _paragraph(lines: str) -> str:
    return f"<p>{'<br>'.join(map(html.escape, lines.splitlines()))}</p>" if lines else ""
