"""What could become of the sites: joint options, and the op calls that each makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.cost import CostModel, OpCall
from ..ir.rewrite import Match
from ..ir.site import AttentionInfo, Site
from ..ir.workload import Scenario
from .propose import Baseline, Proposal, Proposals, total_cost


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


def _lowered(
    sites: tuple[Site, ...],
    chosen: tuple[Proposal, ...],
    scenarios: Sequence[Scenario],
    baseline: Baseline,
) -> Lowered:
    by_family = {p.site.family: p for p in chosen}
    calls = ((scenario, calls_of(sites, by_family, scenario, baseline)) for scenario in scenarios)
    return Lowered(chosen, tuple(calls))


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
    parameters = attention.candidate.parameters
    top_keys, refresh = int(parameters.get("top_keys", 0)), int(parameters.get("refresh", 1))
    info = replace(site.info, window=window, top_keys=top_keys, refresh=refresh)
    return replace(site, info=info)


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
