"""Errors that are expected before any is measured, and the tensors that rewrites prepare."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..ir.site import GroupInfo, Site
from .propose import Proposal
from .statistics import Recorded, Statistics


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
        tensors = self._preparer(proposal)
        output = rewrite.emulate(proposal.match, proposal.candidate, tensors, recorded.inputs)
        if site.head is None:
            return output - recorded.exact()
        assert recorded.outputs is not None
        if any(node != site.node for node, _, _ in self._changes):
            self._changes.clear()  # the heads of one op come one after another
        self._changes[key] = output - recorded.outputs
        return self._changes[key]
