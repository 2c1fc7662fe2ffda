"""From a choice to the decisions and refusals of a plan, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.cost import Cost
from ..ir.plan import KEEP, Alternative, Decision, Refused
from ..ir.site import GroupInfo, Site
from . import explain
from .propose import Proposal, Proposals
from .search import Choice
from .table import Column, Table


def decisions(proposals: Proposals, table: Table, choice: Choice, *, nats: bool) -> list[Decision]:
    """One decision a site, in the order of the graph; joint options give one to each site."""
    made: dict[tuple[str, str], Decision] = {}
    for sites, columns, option in zip(table.keys, table.columns, choice, strict=True):
        for site in sites:
            made[site.family, site.key] = _decision(site, columns, option, nats)
    for decision in list(made.values()):
        for member in _members(proposals, decision) if decision.rewritten else ():
            if member in made:
                how = f"{decision.rewrite} {decision.label}"
                made[member].reason = f"rewritten with {decision.key}: {how}"
    return [
        made.get((s.family, s.key)) or _untouched(s, proposals)
        for s in proposals.sites
        if (s.family, s.key) in made or (s.family, s.key) in proposals.refused
    ]


def _members(proposals: Proposals, decision: Decision) -> list[tuple[str, str]]:
    """Where the linears of a group are decided by themselves."""
    where = (decision.family, decision.key)
    infos = [site.info for site in proposals.sites if (site.family, site.key) == where]
    return [(m.family, m.key) for i in infos if isinstance(i, GroupInfo) for m in i.members]


def refusals(proposals: Proposals) -> list[Refused]:
    """Why rewrites do not serve sites, in the order of the graph."""
    return [
        Refused(
            family=site.family,
            key=site.key,
            rewrite=None if rewrite == "*" else rewrite,
            reason=reason,
        )
        for site in proposals.sites
        for rewrite, reason in proposals.refused.get((site.family, site.key), ())
    ]


def _untouched(site: Site, proposals: Proposals) -> Decision:
    rewrite, reason = proposals.refused[site.family, site.key][0]
    reason = reason if rewrite == "*" else f"{rewrite}: {reason}"
    return Decision(
        key=site.key,
        family=site.family,
        rewrite=KEEP,
        reason=reason,
        locked=(site.family, site.key) in proposals.kept,
    )


def _decision(site: Site, columns: Sequence[Column], option: int, nats: bool) -> Decision:
    mine, kept = columns[option], columns[0]
    proposal = _of(mine, site)
    others = [c for c in _single(columns, site) if _of(c, site) is not proposal]
    if proposal is None:
        return Decision(
            key=site.key,
            family=site.family,
            cost=_share(kept, site),
            error=0.0,
            reason=explain.kept([kept, *others], nats),
            alternatives=[_alternative(site, c, kept, mine) for c in others],
        )
    own = next((c for c in _single(columns, site) if _of(c, site) is proposal), mine)
    together = [p for p in mine.proposals if p is not proposal]
    reason = explain.chosen(mine if together else own, kept, nats)
    if together:
        reason += f"; decided with {together[0].rewrite.name} {together[0].candidate.label}"
    keep = Alternative(
        rewrite=KEEP,
        cost=_share(kept, site),
        error=0.0,
        reason="exact, and what the budget does not allow everywhere",
    )
    return Decision(
        key=site.key,
        family=site.family,
        rewrite=proposal.rewrite.name,
        version=proposal.rewrite.version,
        label=proposal.candidate.label,
        parameters=dict(proposal.candidate.parameters),
        cost=_share(mine, site),
        error=own.error,
        reason=reason,
        alternatives=[keep, *(_alternative(site, c, kept, mine) for c in others)],
    )


def _single(columns: Sequence[Column], site: Site) -> list[Column]:
    """The columns that change this site alone."""
    return [c for c in columns if len(c.proposals) == 1 and _of(c, site) is not None]


def _of(column: Column, site: Site) -> Proposal | None:
    return next((p for p in column.proposals if p.site == site), None)


def _share(column: Column, site: Site) -> Cost:
    """The cost of a column at one of its sites: bytes of the cache count at the cache's, and
    seconds at the attention's where both change."""
    if site.family == "attention":
        return replace(column.cost, state_bytes=0)
    joint = site.family == "kv_cache" and len(column.proposals) > 1
    return replace(column.cost, seconds=0.0) if joint else column.cost


def _alternative(site: Site, column: Column, kept: Column, mine: Column) -> Alternative:
    proposal = _of(column, site)
    assert proposal is not None
    return Alternative(
        rewrite=proposal.rewrite.name,
        label=proposal.candidate.label,
        parameters=dict(proposal.candidate.parameters),
        version=proposal.rewrite.version,
        cost=_share(column, site),
        error=column.error,
        reason=explain.alternative(column, kept, mine),
    )
