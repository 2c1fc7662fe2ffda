"""Budgets: what the rewritten model may cost and how far it may stray, checked as it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from .names import hint
from .units import Limit, parse_bytes, parse_number, parse_seconds

Objective = Literal["latency", "memory", "error"]
Size = int | float | str

SIZE_ROWS = ("memory", "weights", "kv_cache", "activations")
QUALITY_ROWS = ("kl", "loss_increase", "relative_error", "metric")
COST_ROWS = ("latency", *SIZE_ROWS)
UNITS = {"kl": "nats", "loss_increase": "nats", "relative_error": "", "metric_drop": ""}
EXAMPLES = {
    "latency": 'latency="0.7x", latency="12ms" or latency={"decode": "0.7x"}',
    "memory": 'memory="8GiB" or memory="60%"',
    "weights": 'weights="500MB" or weights="40%"',
    "kv_cache": 'kv_cache="40%" or kv_cache="2GiB"',
    "activations": 'activations="50%" or activations="4GiB"',
    "kl": "kl=0.02",
    "loss_increase": "loss_increase=0.05",
    "relative_error": "relative_error=0.01",
    "metric": "metric=accuracy, metric_drop=0.01",
    "metric_drop": "metric=accuracy, metric_drop=0.01",
    "minimize": 'minimize="latency", "memory" or "error"',
}


@dataclass(frozen=True)
class UnboundMetric:
    """The name of a metric in a budget that was read from a file: functions are not stored."""

    name: str

    def __call__(self, module: Any) -> float:
        raise ValueError(
            f"Budget.metric was the function {self.name!r}, which a file cannot hold: hand it in "
            "again with budget.with_metric(function)"
        )


class Budget(BaseModel):
    """The rows that an optimised model is measured to keep; a contract, not a wish.

    `latency`: seconds, "12ms", "0.7x" of the original, or a mapping by workload or scenario name.
    `memory` (device peak), `weights`, `kv_cache`, `activations`: bytes, "8GiB", or "40%" of the
    original. At most one quality row: `kl` and `loss_increase` in nats a position,
    `relative_error` as ‖y-ŷ‖/‖y‖, or `metric` (a function of the module, larger is better) with
    `metric_drop`. `minimize` says what to improve within the rows. Errors are ValueErrors that
    name the field and show an example.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latency: Size | dict[str, Size] | None = None
    memory: Size | None = None
    weights: Size | None = None
    kv_cache: Size | None = None
    activations: Size | None = None
    kl: float | None = None
    loss_increase: float | None = None
    relative_error: float | None = None
    metric: Annotated[
        Callable[[Any], float] | None,
        WithJsonSchema({"anyOf": [{"type": "object", "required": ["name"]}, {"type": "null"}]}),
    ] = None
    metric_drop: float | None = None
    minimize: Objective | None = None

    if not TYPE_CHECKING:

        def __init__(self, **rows: Any) -> None:
            try:
                super().__init__(**rows)
            except ValidationError as error:
                raise ValueError("\n".join(_readable(error))) from None

    @field_validator("latency", mode="before")
    @classmethod
    def _check_latency(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _checked(parse_seconds, value)
        rows = cast("Mapping[object, object]", value)
        if not rows:
            raise ValueError("the mapping is empty")
        if not all(isinstance(name, str) and name for name in rows):
            raise ValueError("the mapping takes names of workloads or scenarios as keys")
        return {name: _checked(parse_seconds, limit) for name, limit in rows.items()}

    @field_validator(*SIZE_ROWS, mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        return _checked(parse_bytes, value)

    @field_validator("kl", "loss_increase", "relative_error", "metric_drop", mode="before")
    @classmethod
    def _check_quality(cls, value: Any) -> Any:
        return None if value is None else _positive(parse_number(value, "")).value

    @field_validator("metric", mode="before")
    @classmethod
    def _check_metric(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(name := value.get("name"), str):
            return UnboundMetric(name)
        if value is not None and not callable(value):
            raise ValueError("takes a function that is given the module and returns a number")
        return value

    @field_serializer("metric")
    def _name_metric(self, metric: Callable[[Any], float] | None) -> dict[str, str] | None:
        if metric is None:
            return None
        named = metric.name if isinstance(metric, UnboundMetric) else _qualified(metric)
        return {"name": named, "note": "a function: hand it in again with with_metric"}

    @model_validator(mode="after")
    def _check_together(self) -> Budget:
        quality = [row for row in QUALITY_ROWS if getattr(self, row) is not None]
        if len(quality) > 1:
            raise ValueError(f"takes one quality row, not {' and '.join(quality)}")
        if (self.metric is None) != (self.metric_drop is None):
            raise ValueError(f"metric and metric_drop belong together: {EXAMPLES['metric']}")
        if not quality and not self.cost_rows:
            raise ValueError('names no row; for example Budget(kl=0.02, kv_cache="40%")')
        if self.minimize in ("latency", "memory") and not quality:
            raise ValueError(
                f"minimize={self.minimize!r} without a quality row would take any output for "
                f"good; add one, for example {EXAMPLES['kl']}"
            )
        return self

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [(name, value) for name, value in self if value is not None]

    @property
    def cost_rows(self) -> tuple[str, ...]:
        """The cost rows that are set, in the order of the fields."""
        return tuple(row for row in COST_ROWS if getattr(self, row) is not None)

    @property
    def quality(self) -> str | None:
        """The quality row that is set: kl, loss_increase, relative_error or metric_drop."""
        row = next((row for row in QUALITY_ROWS if getattr(self, row) is not None), None)
        return "metric_drop" if row == "metric" else row

    @property
    def objective(self) -> Objective:
        """What to minimise within the rows: as asked for, else error without a quality row."""
        return self.minimize or ("latency" if self.quality else "error")

    def rows(self) -> dict[str, Limit]:
        """The limits by row name, quality last; a latency mapping gives `latency.<name>` rows."""
        limits: dict[str, Limit] = {}
        if isinstance(self.latency, dict):
            limits |= {f"latency.{name}": parse_seconds(v) for name, v in self.latency.items()}
        elif self.latency is not None:
            limits["latency"] = parse_seconds(self.latency)
        for row in SIZE_ROWS:
            if getattr(self, row) is not None:
                limits[row] = parse_bytes(getattr(self, row))
        if self.quality:
            limits[self.quality] = parse_number(getattr(self, self.quality), UNITS[self.quality])
        return limits

    def absolute(self, baseline: Mapping[str, float]) -> dict[str, float]:
        """The limits in seconds, bytes and nats, given what the original measures by row name."""
        limits = self.rows()
        missing = [
            name for name, limit in limits.items() if limit.relative and name not in baseline
        ]
        if missing:
            raise ValueError(
                f"Budget.{missing[0]} is a share of what the original model measures, and that was "
                f"not measured (known: {', '.join(baseline) or 'nothing'})"
            )
        return {name: limit.absolute(baseline.get(name, 0.0)) for name, limit in limits.items()}

    def with_metric(self, metric: Callable[[Any], float]) -> Budget:
        """The same budget with its function handed in again, after reading it from a file."""
        rows: dict[str, Any] = {**dict(self), "metric": metric}
        return Budget(**rows)


def _checked(parse: Callable[[object], Limit], value: Any) -> Any:
    """`value` as it was written, if it is a limit at all."""
    if value is not None:
        _positive(parse(value))
    return value


def _positive(limit: Limit) -> Limit:
    if not math.isfinite(limit.value):
        raise ValueError("is not a finite number")
    if limit.value == 0:
        raise ValueError(
            "a budget of zero cannot be kept: every model takes some time and space, and rounding "
            "alone moves its output; leave the row out, or write a small number"
        )
    if limit.value < 0:
        raise ValueError("is negative")
    return limit


def _qualified(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"


def _readable(error: ValidationError) -> list[str]:
    """One line a mistake: the field, what is wrong, and how it is written."""
    lines: list[str] = []
    for mistake in error.errors():
        field = str(mistake["loc"][0]) if mistake["loc"] else ""
        what = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            line = (
                f"Budget has no row {field!r}.{hint(field, EXAMPLES)} Rows: {', '.join(EXAMPLES)}"
            )
        elif not field:
            line = f"Budget: {what}"
        else:
            line = f"Budget.{field}={mistake['input']!r}: {what}. Example: {EXAMPLES[field]}"
        lines.append(line)
    return list(dict.fromkeys(lines))
