"""Attention as it is, by the fastest exact backend.

    softmax(q @ k.T * scale + mask) @ v  ->  attend(q, k, v, mask, scale=..., causal=...)

Capture already writes every spelling of attention as this call, which picks its backend by
shape and device and never holds the [N, T] scores (Rabe and Staats, 2021; Dao et al., 2022), so
nothing is left to edit: the rewrite is the price of keeping a head dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import AttentionInfo, Family, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.attention import calls, emulation


@dataclass(frozen=True)
class Exact:
    """The identity candidate of an attention site."""

    name: ClassVar[str] = "attention.exact"
    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward", "generate", "train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2112.05682"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, AttentionInfo):
            return Refusal(f"{site.family} site: the rewrite serves attention")
        return Refusal(site.blocked) if site.blocked is not None else Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [Candidate(self.name, "exact", {})]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        return None

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The site's own attention, under the window that the model itself has."""
        info = calls.attention_info(match)
        return [calls.attention_call(info, scenario, info.window)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        return {}

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        return emulation.attended(inputs)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Nothing: the graph already makes the exact call."""
