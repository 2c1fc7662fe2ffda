"""Logits of all tokens -> those of the last one, while generating.

    logits = lm_head(hidden)                          # [B, T, vocabulary]
    logits = lm_head(hidden[:, logits_to_keep])       # [B, 1, vocabulary]

The captured graph of a causal model takes the positions that want logits as an input, and
generation asks for the last, so nothing is left to edit: the rewrite records what that saves,
T - 1 rows of the vocabulary a sequence while the prompt is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import Family, Site, TemporaryInfo
from fxopt.ir.workload import Scenario
from fxopt.passes.activation import calls


@dataclass(frozen=True)
class LastLogits:
    """Exact: sampling reads no other logits."""

    name: ClassVar[str] = "activation.last_logits"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, TemporaryInfo) or site.info.kind != "head":
            return Refusal("not the logits of a head")
        return Refusal(site.blocked) if site.blocked is not None else Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [] if self.refusal(match, scenarios) else [Candidate(self.name, "last", {})]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios; None if there is one."""
        if any(scenario.queries > 1 for scenario in scenarios):
            return None
        return "every call of the workload has one token, whose logits are wanted"

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The logits of one position a sequence; the products are those of the linear site."""
        return [calls.temporary_call(calls.temporary_info(match), scenario.batch)]

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
        """The logits of the last position: [B, 1, vocabulary] of `inputs["x"]`, the logits."""
        logits: Tensor = inputs["x"]
        return logits[..., -1:, :]

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Nothing: generation hands the graph the last position alone."""
