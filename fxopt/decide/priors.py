"""Errors that are expected before any is measured, and the tensors that rewrites prepare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..ir.site import GroupInfo
from .propose import Proposal
from .statistics import OnDemand, Statistics
from .streamed import BEYOND

Key = tuple[str, str, str]


class Preparer:
    """Prepared tensors of proposals, made on demand. Those of the last choice are kept, as the
    module made of them keeps them, and beside them the latest others that fit in `limit` bytes."""

    def __init__(self, statistics: Statistics, *, limit: int = BEYOND // 2) -> None:
        self.statistics = statistics
        self._limit = limit
        self._chosen: dict[Key, dict[str, Tensor] | None] = {}
        self._kept: dict[Key, dict[str, Tensor]] = {}
        self._bytes = 0

    def __call__(self, proposal: Proposal) -> dict[str, Tensor]:
        key = _key(proposal)
        tensors = self._held(key)
        if tensors is None:
            # a rewrite that needs nothing has nothing recorded for it
            recorded: Any = OnDemand(self.statistics, proposal.site)
            tensors = proposal.rewrite.prepare(proposal.match, proposal.candidate, recorded)
        if key in self._chosen:
            self._chosen[key] = tensors
        else:
            self._keep(key, tensors)
        return tensors

    def chosen(self, proposals: Iterable[Proposal]) -> list[Proposal]:
        """Keep the tensors of these, once they are made, in place of those of another choice, which
        become the latest others: what is tried about a choice changes few sites and comes back.

        Returns them in the order to ask for them: those whose sites are recorded in one pass follow
        one another.
        """
        proposals = list(proposals)
        before, keys = self._chosen, list(map(_key, proposals))
        self._chosen = {key: self._held(key) for key in keys}
        for key in keys:
            self._drop(key)
        for key, tensors in before.items():
            if tensors is not None and key not in self._chosen:
                self._keep(key, tensors)
        passes = self.statistics.passes(p.site for p in self._waiting(proposals))
        order = {(s.family, s.key): i for i, s in enumerate(s for one in passes for s in one)}
        return sorted(proposals, key=lambda p: order.get(p.where, -1))

    def expect(self, proposals: Iterable[Proposal]) -> None:
        """Say which proposals will be asked about, the first ones first."""
        self.statistics.expect(p.site for p in self._waiting(proposals))

    def _waiting(self, proposals: Iterable[Proposal]) -> list[Proposal]:
        """Those for whose tensors something has to be recorded."""
        return [p for p in proposals if p.rewrite.needs and self._held(_key(p)) is None]

    def _held(self, key: Key) -> dict[str, Tensor] | None:
        found = self._chosen.get(key)
        return self._kept.get(key) if found is None else found

    def _keep(self, key: Key, tensors: dict[str, Tensor]) -> None:
        """Keep these as the latest, and let go of the eldest where they do not fit."""
        self._drop(key)
        size = _bytes(tensors)
        if size > self._limit:
            return
        while self._bytes + size > self._limit:
            self._drop(next(iter(self._kept)))
        self._kept[key] = tensors
        self._bytes += size

    def _drop(self, key: Key) -> None:
        self._bytes -= _bytes(self._kept.pop(key, {}))


def _key(proposal: Proposal) -> Key:
    return proposal.site.key, proposal.rewrite.name, proposal.candidate.label


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


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

    def forget(self) -> None:
        """Let go of what was emulated."""
        self._changes.clear()

    def _of_member(self, proposal: Proposal, member: int) -> float:
        site = proposal.site.members[member]
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
        if any(node != site.node for node, _, _ in self._changes):
            self.forget()  # the heads of one op come one after another
        tensors = self._preparer(proposal)
        output = rewrite.emulate(proposal.match, proposal.candidate, tensors, recorded.inputs)
        if site.head is None:
            return output - recorded.exact()
        assert recorded.outputs is not None
        self._changes[key] = output - recorded.outputs
        return self._changes[key]
