"""Linear layers that read one tensor -> one thin layer for all of them, and one for each.

    q = linear(x, w_q);  k = linear(x, w_k);  v = linear(x, w_v)
    z = linear(x, down)
    q = linear(z, up_q);  k = linear(z, up_k);  v = linear(z, up_v)

Pays where their outputs lie near one subspace, or where apart each would need most of it: the
first factor is stored, read and multiplied once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import Site
from fxopt.ir.workload import Scenario
from fxopt.passes.linear import dense, groups, projection


@dataclass(frozen=True)
class LowRankShared(dense.Structure):
    """`fractions` of the rank at which the factors hold as many parameters as the weights."""

    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)

    name: ClassVar[str] = "linear.low_rank_shared"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07378"
    groups: ClassVar[str] = "shared_input"

    def match(self, site: Site) -> Match | Refusal:
        return groups.refusal(site, "shared_input") or Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = groups.stacked(match)
        ranks = dense.ladder(info, self.fractions, at_most=min(info.in_features, info.out_features))
        touches = tuple(site.key for site in groups.group_info(match).members)
        return [Candidate(self.name, f"rank{r}", {"rank": r}, touches) for r in ranks]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        info = groups.stacked(match)
        return f"no rank saves bytes at {info.out_features} x {info.in_features} in all"

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        rank, members = _rank(candidate), groups.infos(match)
        layers = [
            replace(members[0], out_features=rank, bias=None),
            *(replace(info, in_features=rank) for info in members),
        ]
        return [dense.dense_call(info, scenario) for info in layers]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weights = [dense.weight_of(member) for member in statistics.members]
        shared = statistics.once(
            "shared spectrum", lambda: projection.Shared.of(weights, statistics.gram)
        )
        down, ups = shared.low_rank(_rank(candidate))
        dtype = weights[0].dtype
        factors = {f"up{k}": up.to(dtype).contiguous() for k, up in enumerate(ups)}
        return {"down": down.to(dtype).contiguous(), **factors, **groups.biases(statistics.members)}

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        k = inputs["member"]
        hidden = F.linear(inputs["x"], tensors["down"])
        return F.linear(hidden, tensors[f"up{k}"], tensors.get(f"bias{k}"))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        members = groups.group_info(match).members
        found = groups.nodes(match, self.name, editor)
        down = editor.tensor(members[0], "down", tensors["down"])
        hidden = dense.call(editor, members[0], found[0].args[0], down, None)
        for k, (member, node) in enumerate(zip(members, found, strict=True)):
            _, bias = dense.input_and_bias(node)
            up = editor.tensor(member, "up", tensors[f"up{k}"])
            editor.replace(member, dense.call(editor, member, hidden, up, bias))


def _rank(candidate: Candidate) -> int:
    return int(candidate.parameters["rank"])
