"""Candidates: which rewrites could stand at which sites, what they cost, why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..ir.cost import Cost, CostModel, OpCall
from ..ir.names import select
from ..ir.rewrite import Candidate, Match, Refusal, Rewrite
from ..ir.site import EmbeddingInfo, ExpertsInfo, GroupInfo, LossHeadInfo, Site
from ..ir.workload import Scenario

Baseline = Callable[[Site, Scenario], list[OpCall]]
"""The op calls that stand at a site as it is."""


@dataclass(frozen=True)
class Proposal:
    """One candidate of one rewrite at one site."""

    site: Site
    rewrite: Rewrite
    match: Match
    candidate: Candidate

    @property
    def where(self) -> tuple[str, str]:
        """The family and the key of its site."""
        return self.site.family, self.site.key


Prepare = Callable[[Proposal], Mapping[str, Tensor]]
"""Gives the tensors of a proposal."""


@dataclass
class Remade:
    """A `Prepare` that gives tensors made `anew`, by `Proposal.where`, for those of `prepare`."""

    prepare: Prepare
    anew: dict[tuple[str, str], Mapping[str, Tensor]] = field(default_factory=dict)

    def __call__(self, proposal: Proposal) -> Mapping[str, Tensor]:
        found = self.anew.get(proposal.where)
        return self.prepare(proposal) if found is None else found


@dataclass(frozen=True)
class Proposals:
    """Proposals and refusals by (family, site key), in the order of the graph."""

    sites: tuple[Site, ...]
    by_site: dict[tuple[str, str], list[Proposal]]
    refused: dict[tuple[str, str], list[tuple[str, str]]]
    kept: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    def refuse(self, proposal: Proposal, reason: str) -> None:
        """Note why a candidate is none after all."""
        said = f"{proposal.candidate.label}: {reason}"
        self.refused.setdefault(proposal.where, []).append((proposal.rewrite.name, said))


def propose(
    sites: Sequence[Site],
    rewrites: Sequence[Rewrite],
    scenarios: Sequence[Scenario],
    workload: str,
    keep: Iterable[str] = (),
) -> Proposals:
    """Ask every rewrite about every site; `keep` names sites (exactly or `re:`) left alone."""
    kept = frozenset((site.family, site.key) for site in _matching(sites, keep))
    by_site: dict[tuple[str, str], list[Proposal]] = {}
    refused: dict[tuple[str, str], list[tuple[str, str]]] = {}
    blocked = {site.key for site in sites if site.family == "linear" and site.blocked}
    for site in sites:
        where = (site.family, site.key)
        if where in kept:
            refused[where] = [("*", "kept by the caller (keep=)")]
            continue
        if site.blocked:
            refused[where] = [("*", site.blocked)]
            continue
        if isinstance(site.info, GroupInfo) and any(
            (m.family, m.key) in kept or m.key in blocked for m in site.info.members
        ):
            continue  # said of the member
        for rewrite in rewrites:
            if rewrite.family != site.family or _group_kind(site) != _served(rewrite):
                continue
            found, reason = _ask(rewrite, site, scenarios, workload)
            by_site.setdefault(where, []).extend(found)
            if reason:
                refused.setdefault(where, []).append((rewrite.name, reason))
        if where not in by_site and (reason := _unasked(site)):
            refused.setdefault(where, [("*", reason)])
    return Proposals(tuple(sites), by_site, refused, kept)


def _ask(
    rewrite: Rewrite, site: Site, scenarios: Sequence[Scenario], workload: str
) -> tuple[list[Proposal], str | None]:
    if workload not in rewrite.workloads:
        return [], f"serves {', '.join(sorted(rewrite.workloads))}, not {workload}"
    match = rewrite.match(site)
    if isinstance(match, Refusal):
        return [], match.reason
    found = candidates(rewrite, match, scenarios)
    if not found:
        seen = _seen(site, scenarios)
        return [], rewrite.refusal(match, seen) or "no size of it fits this site"
    return [Proposal(site, rewrite, match, c) for c in found], None


def candidates(rewrite: Rewrite, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
    """What a rewrite offers at a site that it serves, for the calls of a workload."""
    return rewrite.candidates(match, _seen(match.site, scenarios))


def _seen(site: Site, scenarios: Sequence[Scenario]) -> list[Scenario]:
    return [seen for seen in map(site.at, scenarios) if seen is not None]


def _served(rewrite: Rewrite) -> str:
    """The kind of groups that a rewrite serves; `groups` may also be an option of another sense."""
    kind = getattr(rewrite, "groups", "")
    return kind if isinstance(kind, str) else ""


def _group_kind(site: Site) -> str:
    return site.info.kind if isinstance(site.info, GroupInfo | LossHeadInfo | ExpertsInfo) else ""


def _unasked(site: Site) -> str | None:
    """What a site is for which only some rewrites are made, none of which was asked."""
    info = site.info
    if isinstance(info, ExpertsInfo):
        return (
            f"mixture experts: the weights of {info.count} experts are stacked in {info.weight}, "
            "and no rewrite of this call serves them together"
        )
    if not isinstance(info, GroupInfo) or info.kind != "tied":
        return None
    weights = [(m.info.weight, m.key) for m in info.members if isinstance(m.info, EmbeddingInfo)]
    read = ", ".join(f"{weight} in {key}" for weight, key in weights)
    return f"tied weight: also read as {read}, and no rewrite of this call serves them together"


def _matching(sites: Sequence[Site], patterns: Iterable[str]) -> list[Site]:
    chosen = set(select(list(patterns), [site.key for site in sites], "site"))
    return [site for site in sites if site.key in chosen]


def total_cost(calls: Iterable[OpCall], model: CostModel) -> Cost:
    """The sum of the calls' costs; an unknown call counts as free and is not chosen for it."""
    total = Cost()
    for call in calls:
        total = total + (model(call) or Cost())
    return total
