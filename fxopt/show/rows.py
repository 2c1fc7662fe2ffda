"""Rows of a budget as a table: limit, before, predicted, measured, and whether they are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fxopt.ir.budget import Budget
from fxopt.ir.errors import RowResult
from fxopt.ir.units import format_value

COMPARABLE = 10.0
"""Up to this ratio the measured and the predicted value of a row are of one size."""


def with_missing(rows: Sequence[RowResult], budget: Budget) -> list[RowResult]:
    """The rows, and those of the budget that nothing is known of yet."""
    known = {row.name for row in rows}
    missing = [(name, limit) for name, limit in budget.rows().items() if name not in known]
    return [
        *rows,
        *(
            RowResult(name, None if limit.relative else limit.value, None, None, limit.unit)
            for name, limit in missing
        ),
    ]


def limit_texts(budget: Budget) -> dict[str, str]:
    """How the user wrote each limit that is a share of the original, by row name."""
    return {name: limit.text for name, limit in budget.rows().items() if limit.relative}


def cells(row: RowResult, written: Mapping[str, str]) -> list[str]:
    """Name, limit, before, predicted, measured, verdict."""
    limit = format_value(row.limit, row.unit)
    if row.name in written:
        limit = written[row.name] if row.limit is None else f"{written[row.name]} = {limit}"
    values = [format_value(value, row.unit) for value in (row.before, row.predicted, row.measured)]
    return [row.name, limit, *values, verdict(row)]


def verdict(row: RowResult) -> str:
    """Whether a row keeps its limit, as measured; before that, what is expected."""
    if row.limit is None:
        return ""
    if row.measured is None:
        over = row.predicted is not None and row.predicted > row.limit
        return "not measured" + (", predicted to exceed" if over else "")
    if row.excess <= 0:
        return "holds"
    if row.excess < 1:
        return f"exceeded by {row.excess:.1%}"
    far = math.isfinite(row.excess)
    return f"exceeded: {1 + row.excess:.3g}x its limit" if far else "exceeded"


def deviation(row: RowResult) -> str:
    """How far the measurement is from the prediction, as a share of the prediction; "-" where one
    of them is next to nothing, of which shares say nothing."""
    if not row.predicted or row.measured is None:
        return ""
    ratio = row.measured / row.predicted
    return f"{ratio - 1:+.0%}" if 1 / COMPARABLE < ratio < COMPARABLE else "-"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first and the last to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    last = len(heads) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(size) if i in (0, last) else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *lines]
    )


HEADS = ["", "limit", "before", "predicted", "measured", ""]


def budget_table(rows: Sequence[RowResult], written: Mapping[str, str]) -> str:
    return table(HEADS, [cells(row, written) for row in rows])
