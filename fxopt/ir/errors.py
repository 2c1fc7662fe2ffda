"""Errors that a user sees. Each says what, where (qualified name), why and what to do next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose."""


class CaptureError(FxoptError):
    """The model cannot be captured as a graph."""


class PlanError(FxoptError):
    """A plan does not fit the model, the installed rewrites, or its own schema."""


class ExportError(FxoptError):
    """The module cannot be written in the requested format; nothing was written."""


@dataclass(frozen=True)
class RowResult:
    """One row of the budget: what was allowed, predicted and measured (same unit).

    `unit` is "s", "bytes" or "nats" and so on; `limit` is None for rows that are only reported.
    """

    name: str
    limit: float | None
    predicted: float | None
    measured: float | None
    unit: str
    before: float | None = None

    @property
    def excess(self) -> float:
        """measured / limit - 1: positive when the row is violated."""
        if self.limit is None or self.measured is None:
            return 0.0
        return excess(self.measured, self.limit)


def excess(measured: float, limit: float) -> float:
    """measured / limit - 1; infinite for what is no number, which keeps no limit."""
    if math.isnan(measured):
        return math.inf
    if limit == 0:
        return 0.0 if measured <= 0 else math.inf
    return measured / limit - 1.0


class BudgetError(FxoptError):
    """No plan was measured to keep the budget.

    `rows` are the measured rows of `best`, the realised module nearest to the budget;
    `binding` is the row that stands in the way.
    """

    def __init__(self, message: str, rows: list[RowResult], binding: str, best: Any) -> None:
        super().__init__(message)
        self.rows = rows
        self.binding = binding
        self.best = best
