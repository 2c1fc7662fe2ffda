"""From proposals to the columns of the program: joint options with their amounts a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ..ir.cost import Cost, CostModel, OpCall
from ..ir.rewrite import Match
from ..ir.site import AttentionInfo, GroupInfo, Site
from ..ir.workload import Scenario
from .peaks import PEAK_ROWS, row_at
from .problem import Group, Option
from .propose import Baseline, Proposal, Proposals, total_cost
from .statistics import Recorded, Statistics

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
                for site in _members(sites[0]):
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


class Preparer:
    """Prepared tensors of proposals, made on demand and kept while they fit in `limit` bytes."""

    def __init__(self, statistics: Statistics, *, limit: int = 2 * 2**30) -> None:
        self.statistics = statistics
        self._limit = limit
        self._kept: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        self._bytes = 0
        self._site: tuple[str, str] | None = None
        self._recorded = Recorded()

    def __call__(self, proposal: Proposal) -> dict[str, Tensor]:
        key = (proposal.site.key, proposal.rewrite.name, proposal.candidate.label)
        if key in self._kept:
            return self._kept[key]
        recorded = self._at(proposal.site)
        tensors = proposal.rewrite.prepare(proposal.match, proposal.candidate, recorded)
        size = sum(t.nbytes for t in tensors.values())
        if self._bytes + size <= self._limit:
            self._kept[key] = tensors
            self._bytes += size
        return tensors

    def _at(self, site: Site) -> Recorded:
        """What was recorded at `site`; what its candidates share goes when another is asked for."""
        if self._site != (site.family, site.key):
            self._site = (site.family, site.key)
            self._recorded = replace(self.statistics.at(site), made={})
        return self._recorded


@dataclass(frozen=True)
class Lowered:
    """One joint option of a group, and the op calls of its sites in each call of the workload."""

    proposals: tuple[Proposal, ...]
    calls: tuple[tuple[Scenario, list[OpCall]], ...]


Options = tuple[tuple[Site, ...], list[Lowered]]
"""Sites that are decided together, and what could become of them; the first keeps them."""


def lowered(
    proposals: Proposals, scenarios: Sequence[Scenario], baseline: Baseline
) -> list[Options]:
    """The options of all sites that have any. Attention and KV cache of one head are one joint
    decision."""
    found: list[Options] = []
    for sites in joint(proposals.sites):
        offered = [proposals.by_site.get((s.family, s.key), []) for s in sites]
        if any(offered):
            made = [_lowered(sites, c, scenarios, baseline) for c in _product(offered)]
            found.append((sites, made))
    return found


def _lowered(
    sites: tuple[Site, ...],
    chosen: tuple[Proposal, ...],
    scenarios: Sequence[Scenario],
    baseline: Baseline,
) -> Lowered:
    by_family = {p.site.family: p for p in chosen}
    calls = ((scenario, calls_of(sites, by_family, scenario, baseline)) for scenario in scenarios)
    return Lowered(chosen, tuple(calls))


def promising(options: Iterable[Options], price: CostModel) -> list[OpCall]:
    """The distinct calls that could be timed, those first that tell most: what stands there now;
    of each family one, which others can be told by; then by what an option with the call saves of
    all seconds, at `price`."""
    calls: dict[str, OpCall] = {}
    saved: dict[str, float] = {}
    for _, made in options:
        kept = _seconds(made[0], price)
        for option in made:
            gain = kept - _seconds(option, price) if option.proposals else math.inf
            for call in _timed(option):
                calls[call.key] = call
                saved[call.key] = max(saved.get(call.key, -math.inf), gain)
    best = sorted(calls, key=lambda key: -saved[key])
    kept = [key for key in best if saved[key] == math.inf]
    first: dict[str, str] = {}
    for key in best:
        first.setdefault(calls[key].family or key, key)
    return [calls[key] for key in dict.fromkeys([*kept, *first.values(), *best])]


def _timed(option: Lowered) -> Iterator[OpCall]:
    """The calls of an option that can be run; a scenario of no repeats is there for its bytes."""
    for scenario, made in option.calls:
        yield from (call for call in made if scenario.repeats and call.run is not None)


def _seconds(option: Lowered, price: CostModel) -> float:
    totals = (s.repeats * total_cost(made, price).seconds for s, made in option.calls if s.repeats)
    return sum(totals)


def build(
    proposals: Proposals,
    options: Collection[Options],
    cost: CostModel,
    prior_of: Callable[[Proposal], float],
    watch: Callable[[Collection[Options]], Iterable[Options]] = iter,
) -> Table:
    """Price every option.

    `prior_of` gives the additive error of one proposal alone; what returns no number is refused in
    `proposals`. `watch` iterates over the options, and may count the sites.
    """
    keys: list[tuple[Site, ...]] = []
    columns: list[list[Column]] = []
    for sites, made in watch(options):
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


def joint(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sites that are decided together: attention and cache of a head; each other site alone."""
    caches = {s.key: s for s in sites if s.family == "kv_cache"}
    groups: list[tuple[Site, ...]] = []
    for site in sites:
        if site.family == "attention" and site.key in caches:
            groups.append((site, caches[site.key]))
        elif site.family != "kv_cache":
            groups.append((site,))
    return groups


def _product(options: list[list[Proposal]]) -> list[tuple[Proposal, ...]]:
    chosen: list[tuple[Proposal, ...]] = [()]
    for proposals in options:
        changing = [p for p in proposals if not is_identity(p)]
        chosen = [c + extra for c in chosen for extra in [(), *((p,) for p in changing)]]
    return chosen


def is_identity(proposal: Proposal) -> bool:
    """An exact choice that the canonical graph already makes (`attention.exact`)."""
    return proposal.rewrite.exact and not proposal.candidate.parameters


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


def calls_of(
    sites: Sequence[Site],
    by_family: Mapping[str, Proposal],
    scenario: Scenario,
    baseline: Baseline,
) -> list[OpCall]:
    """The op calls of sites that are decided together, in a call of the workload; a family
    without a proposal keeps its site."""
    made: list[OpCall] = []
    cached = any(s.family == "kv_cache" and _is_cached(s) for s in sites)
    for site in sites:
        seen = site.at(scenario)
        if seen is None:
            continue
        if site.family == "attention" and cached and seen.past > 0:
            continue  # the cache's own call reads and attends
        proposal = by_family.get(site.family)
        if proposal is None:
            made += baseline(_as_read(site, by_family), seen)
        else:
            match = Match(_as_read(site, by_family), proposal.match.extra)
            made += proposal.rewrite.lower(match, proposal.candidate, seen)
    return made


def _bytes_only(call: OpCall) -> Cost:
    return Cost(0.0, call.weight_bytes, call.state_bytes, call.temporary_bytes)


def _is_cached(site: Site) -> bool:
    return isinstance(site.info, AttentionInfo) and site.info.cached


def _as_read(site: Site, by_family: Mapping[str, Proposal]) -> Site:
    """A cache under a window is read within the window alone, and one whose tokens are chosen
    among in the chosen ones: the site as it then is."""
    attention = by_family.get("attention")
    if site.family != "kv_cache" or attention is None or not isinstance(site.info, AttentionInfo):
        return site
    windows = (int(attention.candidate.parameters.get("window", 0)), site.info.window)
    window = min((w for w in windows if w > 0), default=0)
    top_keys = int(attention.candidate.parameters.get("top_keys", 0))
    return replace(site, info=replace(site.info, window=window, top_keys=top_keys))


def _members(site: Site) -> tuple[Site, ...]:
    return site.info.members if isinstance(site.info, GroupInfo) else (site,)


class Priors:
    """Fisher-Taylor priors; attention candidates are emulated once for all heads of an op."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self._changes: dict[tuple[str, str, str], Tensor] = {}

    def __call__(self, proposal: Proposal) -> float:
        statistics = self._preparer.statistics
        site, recorded = proposal.site, statistics.at(proposal.site)
        if recorded.gradients is None:
            return 0.0
        if isinstance(site.info, GroupInfo):
            return sum(self._of_member(proposal, k) for k in site.info.outputs)
        return statistics.second_order(site, self._change(proposal))

    def _of_member(self, proposal: Proposal, member: int) -> float:
        site = _members(proposal.site)[member]
        recorded = self._preparer.statistics.at(site)
        inputs = {**recorded.inputs, "member": member}
        tensors = self._preparer(proposal)
        output = proposal.rewrite.emulate(proposal.match, proposal.candidate, tensors, inputs)
        return self._preparer.statistics.second_order(site, output - recorded.exact())

    def _change(self, proposal: Proposal) -> Tensor:
        site, rewrite = proposal.site, proposal.rewrite
        recorded = self._preparer.statistics.at(site)
        key = (site.node, rewrite.name, proposal.candidate.label)
        if key in self._changes:
            return self._changes[key]
        tensors = self._preparer(proposal)
        output = rewrite.emulate(proposal.match, proposal.candidate, tensors, recorded.inputs)
        if site.head is None:
            return output - recorded.exact()
        assert recorded.outputs is not None
        if any(node != site.node for node, _, _ in self._changes):
            self._changes.clear()  # the heads of one op come one after another
        self._changes[key] = output - recorded.outputs
        return self._changes[key]
