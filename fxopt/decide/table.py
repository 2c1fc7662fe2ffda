"""The columns of the program: joint options with their amounts a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..ir.cost import Cost, CostModel, OpCall
from ..ir.site import Site
from .options import Lowered, Options
from .peaks import PEAK_ROWS, row_at
from .problem import Group, Option
from .propose import Proposal, Proposals, total_cost

KEEP = "keep"
Rows = dict[str, float]


class Swapped(NamedTuple):
    """The additive error that was measured of one option alone; `within` is half of its 95 %
    interval (None: unknown)."""

    error: float
    within: float | None = None


@dataclass(frozen=True)
class Column:
    """One joint option of a group: the proposals it realises (none: keep), what it costs and
    errs. `prior` and `measured` are additive errors, the latter `within` half of its 95 % interval
    (None: unknown) where it was `swapped`, and not known to be exact. `seconds` is of one call, by
    scenario, and of all calls of a named workload; `timed` names the scenarios of which all ops
    were timed on the device. `host` are the seconds to issue a call, by scenario."""

    proposals: tuple[Proposal, ...]
    cost: Cost
    prior: float
    measured: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    timed: frozenset[str] = frozenset()
    host: Mapping[str, float] = field(default_factory=dict)
    within: float | None = None
    swapped: bool = False

    @property
    def label(self) -> str:
        return "+".join(p.candidate.label for p in self.proposals) or KEEP

    @property
    def exact(self) -> bool:
        """Whether none of its rewrites changes an output."""
        return all(p.rewrite.exact for p in self.proposals)

    @property
    def error(self) -> float:
        """The best estimate of the additive error."""
        return self.prior if self.measured is None else self.measured


@dataclass
class Table:
    """Groups of columns; column 0 of each group keeps its sites as they are.

    `factor` corrects unmeasured priors by what was measured of the same kind of candidate.
    """

    keys: list[tuple[Site, ...]]
    columns: list[list[Column]]
    factor: dict[str, float] = field(default_factory=dict)

    @property
    def exclusive(self) -> tuple[tuple[int, ...], ...]:
        """Indices of decisions of which at most one rewrites anything: those that change one
        linear, alone or with others."""
        changing: dict[str, list[int]] = {}
        for g, sites in enumerate(self.keys):
            if sites[0].family == "linear":
                for site in sites[0].members:
                    changing.setdefault(site.key, []).append(g)
        return tuple(dict.fromkeys(tuple(found) for found in changing.values() if len(found) > 1))

    def groups(self, scales: Mapping[str, float]) -> tuple[Group, ...]:
        """The solver's groups, amounts in rows multiplied by `scales`."""
        return tuple(
            Group(sites[0].key, tuple(self._option(c, columns[0], scales) for c in columns))
            for sites, columns in zip(self.keys, self.columns, strict=True)
        )

    def taken(self, scales: Mapping[str, float], choice: Sequence[int]) -> tuple[Group, ...]:
        """Those groups with the option alone that `choice` takes."""
        return tuple(
            Group(sites[0].key, (self._option(columns[o], columns[0], scales),))
            for sites, columns, o in zip(self.keys, self.columns, choice, strict=True)
        )

    def _option(self, column: Column, kept: Column, scales: Mapping[str, float]) -> Option:
        amounts = self.amounts(column, kept)
        return Option(column.label, {r: scales.get(r, 1.0) * x for r, x in amounts.items()})

    def amounts(self, column: Column, kept: Column) -> Rows:
        """What a column adds to each row; `kept` is the first of its group."""
        error = column.error if math.isfinite(column.error) else 0.0  # forbidden, then
        if column.measured is None:
            error *= self.factor.get(kind(column), 1.0)
        return {
            "error": max(error, 0.0),
            "latency": column.cost.seconds,
            **{f"latency.{name}": seconds for name, seconds in column.seconds.items()},
            "weights": float(column.cost.weight_bytes),
            "kv_cache": float(column.cost.state_bytes),
            "memory": float(column.cost.weight_bytes + column.cost.state_bytes),
            **_shrunk(column, kept),
        }

    def learn(self) -> None:
        """Correct the priors of each kind of candidate by the ratio seen where it was measured."""
        sums: dict[str, tuple[float, float]] = {}
        for columns in self.columns:
            for column in columns:
                if column.measured is None or not math.isfinite(column.measured):
                    continue  # what is no number says nothing of others of its kind
                if column.prior > 0:
                    prior, seen = sums.get(kind(column), (0.0, 0.0))
                    sums[kind(column)] = (prior + column.prior, seen + max(column.measured, 0.0))
        self.factor = {k: min(max(seen / prior, 0.1), 10.0) for k, (prior, seen) in sums.items()}


def _shrunk(column: Column, kept: Column) -> Rows:
    """What the rewrite of a large intermediate takes off the peaks at its own point."""
    sites = [p.site for p in column.proposals if p.site.family == "activation"]
    change = float(column.cost.temporary_bytes - kept.cost.temporary_bytes)
    return {row_at(row, site.key): change for site in sites for row in PEAK_ROWS}


def kind(column: Column) -> str:
    """Candidates of equal kind share a correction of their priors."""
    return "+".join(f"{p.rewrite.name}:{p.candidate.label}" for p in column.proposals)


def build(
    proposals: Proposals,
    options: Iterable[Options],
    cost: CostModel,
    prior_of: Callable[[Proposal], float],
) -> Table:
    """Price every option.

    `prior_of` gives the additive error of one proposal alone; what returns no number is refused in
    `proposals`.
    """
    keys: list[tuple[Site, ...]] = []
    columns: list[list[Column]] = []
    for sites, made in options:
        keys.append(sites)
        columns.append([])
        for option in made:
            chosen = option.proposals
            total, seconds, host, timed = _cost(option, cost)
            known = 0.0 if all(p.rewrite.exact for p in chosen) else None
            prior = sum(0.0 if p.rewrite.exact else prior_of(p) for p in chosen)
            if math.isfinite(prior):
                columns[-1].append(Column(chosen, total, prior, known, seconds, timed, host))
            elif len(chosen) == 1:
                proposals.refuse(chosen[0], "its output is no number on the calibration data")
    return Table(keys, columns)


def _cost(
    option: Lowered, model: CostModel
) -> tuple[Cost, dict[str, float], dict[str, float], frozenset[str]]:
    """Seconds summed over scenarios (and of one call each, on the device and to issue), bytes at
    the last (longest) one; the scenarios of which the model timed every op.

    Temporaries are those of the call with the most. A scenario of no repeats is there for its
    bytes: its calls are not timed.
    """
    seconds: dict[str, float] = {}
    host: dict[str, float] = {}
    timed: set[str] = set()
    known: Collection[str] = getattr(model, "measured", ())
    repeated = 0.0
    bytes_ = Cost()
    for scenario, made in option.calls:
        price = model if scenario.repeats else _bytes_only
        total = total_cost(made, price)
        if scenario.repeats:
            seconds[scenario.name], host[scenario.name] = total.seconds, total.host
            if workload := scenario.name.rpartition(".")[0]:
                whole = seconds.get(workload, 0.0) + scenario.repeats * total.seconds
                seconds[workload] = whole
            repeated += scenario.repeats * total.seconds
            timed |= {scenario.name} if all(call.key in known for call in made) else set()
        bytes_ = replace(total, temporary_bytes=max(bytes_.temporary_bytes, total.temporary_bytes))
    return replace(bytes_, seconds=repeated), seconds, host, frozenset(timed)


def _bytes_only(call: OpCall) -> Cost:
    return Cost(0.0, call.weight_bytes, call.state_bytes, call.temporary_bytes)
