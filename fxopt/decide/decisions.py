"""From a choice to the decisions and refusals of a plan, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from ..ir.cost import Cost
from ..ir.decision import KeptMass
from ..ir.evidence import Pair
from ..ir.plan import KEEP, Alternative, Decision, Refused
from ..ir.site import GroupInfo, Site
from .explain import Choice, Explainer
from .options import is_identity
from .propose import Proposal, Proposals
from .table import Column, Table


class Masses(Protocol):
    """What a proposal leaves of a head's attention; None where it hides no keys."""

    def __call__(self, proposal: Proposal, /) -> KeptMass | None: ...


def decisions(
    proposals: Proposals, table: Table, why: Explainer, mass: Masses = lambda _: None
) -> list[Decision]:
    """One decision a site, in the order of the graph; joint options give one to each site."""
    made: dict[tuple[str, str], Decision] = {}
    for group, sites in enumerate(table.keys):
        for site in sites:
            here = _Here(proposals, table, why, group, site, mass)
            made[site.family, site.key] = here.decision()
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


def pairs(proposals: Proposals, table: Table, why: Explainer) -> list[Pair]:
    """What attention and cache of a head are as a whole, where they are chosen as one."""
    return [
        _Here(proposals, table, why, group, sites[0]).pair(sites[1])
        for group, sites in enumerate(table.keys)
        if len(sites) > 1
    ]


def _members(proposals: Proposals, decision: Decision) -> list[tuple[str, str]]:
    """Where the linears of a group are decided by themselves."""
    where = (decision.family, decision.key)
    infos = [site.info for site in proposals.sites if (site.family, site.key) == where]
    members = [m for i in infos if isinstance(i, GroupInfo) for m in i.members]
    return [(m.family, m.key) for m in members if m.key != decision.key]


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


class _Here:
    """The options of one decision as they concern one of its sites, all else as chosen."""

    def __init__(
        self,
        proposals: Proposals,
        table: Table,
        why: Explainer,
        group: int,
        site: Site,
        mass: Masses = lambda _: None,
    ) -> None:
        self.proposals, self.table, self.why, self.mass = proposals, table, why, mass
        self.group, self.site = group, site
        self.columns = table.columns[group]
        self.option = why.swaps.stand.choice[group]
        self.mine = self.columns[self.option]
        self.joint = len(table.keys[group]) > 1
        beside = _beside(self.mine, site)
        self.options = [o for o, c in enumerate(self.columns) if _beside(c, site) == beside]

    def decision(self) -> Decision:
        """What happens at the site, and what else could."""
        return Decision(
            key=self.site.key,
            family=self.site.family,
            **self._fields(self.option),
            reason=self._reason(),
            alternatives=[self._alternative(o) for o in self.options if o != self.option],
            already=self._already(),
        )

    def _reason(self) -> str:
        proposal = _of(self.mine, self.site)
        others = {o: self._choice(o) for o in self.options if o != self.option}
        if not others:
            names = " and ".join(self._already())
            return f"already the exact call that {names} makes" if names else "no candidate is left"
        if proposal is None:
            return self.why.kept(self.group, self._choice(self.option), others)
        together = [p for p in self.mine.proposals if p is not proposal]
        if together:
            with_ = f"{together[0].rewrite.name} {together[0].candidate.label}"
            return f"{self._gain()}; decided with {with_}"
        return self._gain()

    def _gain(self) -> str:
        """What the chosen column serves, against all of its sites as they were."""
        return self.why.chosen(self.group, 0, self._choice(self.option), self._choice(0))

    def pair(self, cache: Site) -> Pair:
        """The two sites as one, for those who read the plan."""
        chosen = [_of(self.mine, self.site), _of(self.mine, cache)]
        names = [f"{p.rewrite.name} {p.candidate.label}".strip() if p else "kept" for p in chosen]
        kept, first = self.columns[0], self._choice(0)
        reason = ""
        if self.option != 0:
            reason = self.why.alternative(self.group, 0, self._choice(self.option), first)
        return Pair(
            key=self.site.key,
            choices=names,
            kept=Alternative(
                rewrite=KEEP,
                cost=kept.cost,
                error=first.error,
                calls=dict(kept.seconds),
                timed=[name for name in kept.seconds if name in kept.timed],
                reason=reason,
            ),
            reason=self._gain() if all(chosen) else "",
            error_measured=self.mine.measured is not None if self.option else None,
        )

    def _already(self) -> list[str]:
        """Rewrites that offered what stands here."""
        offered = self.proposals.by_site.get((self.site.family, self.site.key), [])
        return list(dict.fromkeys(p.rewrite.name for p in offered if is_identity(p)))

    def _alternative(self, option: int) -> Alternative:
        choices = self._choice(self.option), self._choice(option)
        reason = self.why.alternative(self.group, option, *choices)
        return Alternative(**self._fields(option), reason=reason)

    def _choice(self, option: int) -> Choice:
        """What reasons compare: of a pair all that it takes, since neither is chosen alone."""
        column, proposal = self.columns[option], _of(self.columns[option], self.site)
        name = proposal.candidate.label if proposal else KEEP
        if self.joint:
            return Choice(name, column.cost, self.table.amounts(column, self.columns[0])["error"])
        return Choice(name, self._cost(option), self._error(option))

    def _fields(self, option: int) -> dict[str, Any]:
        """What a decision and its alternatives have in common."""
        column, proposal = self.columns[option], _of(self.columns[option], self.site)
        measured = column.measured is not None and self._apart.measured is not None
        fields: dict[str, Any] = {
            "cost": self._cost(option),
            "error": self._error(option),
            "calls": self._calls(option),
            "timed": self._timed(option),
            "error_measured": measured if proposal else None,
            "error_within": self._within(option) if proposal else None,
        }
        if proposal is None:
            return {"rewrite": KEEP, **fields}
        return {
            "rewrite": proposal.rewrite.name,
            "version": proposal.rewrite.version,
            "label": proposal.candidate.label,
            "parameters": dict(proposal.candidate.parameters),
            "kept_mass": self.mass(proposal),
            "density": proposal.match.extra.get("density"),
            **fields,
        }

    @cached_property
    def _apart(self) -> Column:
        """The attention of what was chosen, its cache as it is: what divides a joint cost."""
        alone = tuple(p for p in self.mine.proposals if p.site.family == "attention")
        return next(c for c in self.columns if c.proposals == alone)

    def _share(self, total: float, apart: float, mine: float) -> float:
        """Of an additive amount of an option: a cache adds what its attention alone had not."""
        if not self.joint:
            return total
        return total - (apart if self.site.family == "kv_cache" else mine - apart)

    def _cost(self, option: int) -> Cost:
        cost = self.columns[option].cost
        seconds = (c.cost.seconds for c in (self.columns[option], self._apart, self.mine))
        cost = replace(cost, seconds=self._share(*seconds))
        if self.site.family != "attention":
            return cost
        # what packing needs is its cache's
        own = tuple(p for p in self.columns[option].proposals if p.site == self.site)
        alone = next(c.cost for c in self.columns if c.proposals == own)
        return replace(cost, state_bytes=0, temporary_bytes=alone.temporary_bytes)

    def _error(self, option: int) -> float:
        table, kept = self.table, self.columns[0]
        columns = (self.columns[option], self._apart, self.mine)
        return self._share(*(table.amounts(c, kept)["error"] for c in columns))

    def _within(self, option: int) -> float | None:
        """Of an error that is the option's own and no share of it."""
        column = self.columns[option]
        own = self.table.amounts(column, self.columns[0])["error"]
        return column.within if self._error(option) == own else None

    def _calls(self, option: int) -> dict[str, float]:
        columns = (self.columns[option], self._apart, self.mine)
        names = self.columns[option].seconds
        return {name: self._share(*(c.seconds[name] for c in columns)) for name in names}

    def _timed(self, option: int) -> list[str]:
        columns = (self.columns[option], self._apart, self.mine)
        return [n for n in columns[0].seconds if all(n in column.timed for column in columns)]


def _of(column: Column, site: Site) -> Proposal | None:
    return next((p for p in column.proposals if p.site == site), None)


def _beside(column: Column, site: Site) -> tuple[Proposal, ...]:
    """What a column changes at other sites."""
    return tuple(p for p in column.proposals if p.site != site)
