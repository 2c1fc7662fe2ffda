"""A tensor saved for the backward -> the ops that made it, run again when the backward needs it.

    h = gelu(x);  saved: x, h            # h is alive from here to its place in the backward
    h = gelu(x);  saved: x               # backward: h = gelu(x), then as before

Exact: the same ops on the same bits. Random ops draw what they first drew (their generator's state
is saved instead), batch norm does not move its running statistics a second time. Pays in the
seconds of the ops that run again; which tensors together is what the solver decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.saved import AGAIN, MARK
from fxopt.ir.site import Family, SavedInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.activation.unchanged import Unchanged


@dataclass(frozen=True)
class Recompute(Unchanged):
    """Chosen for single tensors, not for layers."""

    name: ClassVar[str] = "activation.recompute"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/1604.06174"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, SavedInfo):
            return Refusal("not a tensor that is saved for the backward")
        return Refusal(site.info.blocked) if site.info.blocked else Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [Candidate(self.name, "", {})]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """None: whatever matches can be computed again."""
        return None

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The ops that run again if this tensor alone is not saved."""
        assert isinstance(match.site.info, SavedInfo)
        return list(match.site.info.calls)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; where the second run stands follows from all marks together."""
        editor.node(match.site).meta[MARK] = AGAIN
