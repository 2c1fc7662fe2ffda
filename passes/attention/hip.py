"""Attention -> in prompts, the key tiles of the most attention, found by halving chunks of keys.

    attend(q, k, v, mask, causal=True)
    attend(q, k, v, mask, causal=True, top=(100, 0), hip=(1, 0))    # KV head 0 only

Pays where `attention.block_topk` does, and in the longest prompts more: it asks every 16th query of
all keys, which is 1/32 of dense attention at any length, and here a tile of queries looks at about
twice as many chunks as it keeps tiles, level by level (HiP Attention). What neither stands out in
its chunk nor has neighbours that do may be missed. The last queries of a prompt and decoded tokens
see all keys: their attention costs what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, SiteStatistics
from fxopt.ir.workload import Scenario
from fxopt.kernels.hip.reference import chosen_tiles
from fxopt.passes.attention import calls, emulation
from fxopt.passes.attention.kept_tiles import KeptTiles, kept_mass, set_option, share_of


@dataclass(frozen=True)
class Hip(KeptTiles):
    """Shares of the key tiles; see `KeptTiles`."""

    name: ClassVar[str] = "attention.hip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.09827"

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [
            Candidate(self.name, f"hip{share / 10:g}%", {"top": share})
            for share in self.fitting(scenarios)
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts by the pairs that are computed and the search; decoding is dense."""
        info = calls.attention_info(match)
        return [calls.kept_tiles_call(info, scenario, share_of(candidate), hip=True)]

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
        """Every head of the op under this share, tokens past the prompt seeing all keys."""
        return emulation.attended_as_decoded(inputs, top=[share_of(candidate)], hip=[1])

    def is_mask(self, candidate: Candidate) -> bool:
        return True

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        return kept_mass(candidate, inputs, rows, chosen_tiles)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        set_option(match, "top", share_of(candidate), editor)
        set_option(match, "hip", 1, editor)
