"""Attention -> in prompts, the key tiles that are estimated to hold the most attention.

    attend(q, k, v, mask, causal=True)
    attend(q, k, v, mask, causal=True, top=(100, 0))    # KV head 0 only, a tenth of its tiles

Pays in long prompts, in heads that fetch from far away but from few places: a window of equal cost
loses those (SampleAttention, XAttention, FlexPrefill). The tiles are chosen anew in each call, by
what every 16th query attends to, so what only the others look for may be missed. The last queries
of a prompt and decoded tokens see all keys: their attention costs what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, SiteStatistics
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.delta import EVERY
from fxopt.kernels.block_topk.reference import chosen_tiles
from fxopt.passes.attention import calls, corrected, emulation
from fxopt.passes.attention.kept_tiles import KeptTiles, kept_mass, set_option, share_of


@dataclass(frozen=True)
class BlockTopk(KeptTiles):
    """Where the pairs that are computed are at most `corrected`, a share is offered corrected as
    well, by rows that see all keys; see `corrected.py`."""

    corrected: float = 0.3

    name: ClassVar[str] = "attention.block_topk"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15486"

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [
            Candidate(self.name, f"top{share / 10:g}%", {"top": share})
            for share in self.fitting(scenarios)
        ] + [
            Candidate(
                self.name, f"top{share / 10:g}%{corrected.SUFFIX}", {"top": share, "delta": EVERY}
            )
            for share in self.fitting(scenarios, self.corrected)
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts by the pairs that are computed and the estimate; decoding is dense."""
        info, top = calls.attention_info(match), share_of(candidate)
        if _is_corrected(candidate):
            return [calls.corrected_call(info, scenario, top=top)]
        return [calls.kept_tiles_call(info, scenario, top)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        if not _is_corrected(candidate):
            return {}
        return corrected.shares(statistics, top=[share_of(candidate)])

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Every head of the op under this share, tokens past the prompt seeing all keys."""
        delta = tensors["share"].tolist() if _is_corrected(candidate) else [0]
        return emulation.attended_as_decoded(inputs, top=[share_of(candidate)], delta=delta)

    def is_mask(self, candidate: Candidate) -> bool:
        return not _is_corrected(candidate)

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        return kept_mass(candidate, inputs, rows, chosen_tiles)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        set_option(match, "top", share_of(candidate), editor)
        if _is_corrected(candidate):
            info = calls.attention_info(match)
            corrected.apply(match.site, info, tensors["share"], editor)


def _is_corrected(candidate: Candidate) -> bool:
    return "delta" in candidate.parameters
