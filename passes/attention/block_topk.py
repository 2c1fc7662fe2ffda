"""Attention -> in prompts, the key tiles that are estimated to hold the most attention.

    attend(q, k, v, mask, causal=True)
    attend(q, k, v, mask, causal=True, top=(100, 0))    # KV head 0 only, a tenth of its tiles
    attend(q, k, v, mask, causal=True, top=(500, 0), mass=(950, 0))    # 95 % of its attention

Pays in long prompts, in heads that fetch from far away but from few places: a window of equal cost
loses those (SampleAttention, XAttention, FlexPrefill). The tiles are chosen anew in each call, by
what every 16th query attends to, so what only the others look for may be missed. The last queries
of a prompt and decoded tokens see all keys: their attention costs what it did.
A share costs the same whatever the data are; where a part of the attention is to be kept, sharp
heads and rows cost less, which only calibration data tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, SiteStatistics
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.delta import EVERY
from fxopt.kernels.block_topk.reference import SPARED, chosen_tiles, hides, hides_some, tiles
from fxopt.passes.attention import calls, corrected, emulation
from fxopt.passes.attention.kept_tiles import (
    Choose,
    KeptTiles,
    kept_mass,
    mass_of,
    part_of_pairs,
    set_option,
    share_of,
    tiles_of,
)


@dataclass(frozen=True)
class BlockTopk(KeptTiles):
    """Where the pairs that are computed are at most `corrected`, a share is offered corrected as
    well, by rows that see all keys; see `corrected.py`. `masses` are per mille of the estimated
    attention, for which at most `cap` per mille of the tiles are kept; they are offered where under
    the cap at most `most` of the pairs are computed."""

    masses: tuple[int, ...] = (900, 950)
    cap: int = 400
    corrected: float = 0.3

    name: ClassVar[str] = "attention.block_topk"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15486"

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return (
            [
                Candidate(self.name, f"top{share / 10:g}%", {"top": share})
                for share in self.fitting(scenarios)
            ]
            + [
                Candidate(
                    self.name,
                    f"top{share / 10:g}%{corrected.SUFFIX}",
                    {"top": share, "delta": EVERY},
                )
                for share in self.fitting(scenarios, self.corrected)
            ]
            + [
                Candidate(self.name, f"mass{mass / 10:g}%", {"mass": mass, "top": self.cap})
                for mass in self._fitting_masses(scenarios)
            ]
        )

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        if self._fitting_masses(scenarios):
            return None
        return super().refusal(match, scenarios)

    def _fitting_masses(self, scenarios: Sequence[Scenario]) -> list[int]:
        """The parts of the attention that may be cheap to keep in the longest prompt."""
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            return []
        return [
            mass
            for mass in sorted(self.masses)
            if hides_some(prompt.queries, prompt.length, self.cap, mass)
            and part_of_pairs(prompt, self.cap, mass) <= self.most
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts by the pairs that are computed and the estimate; decoding is dense. A part of
        the attention by the tiles that are expected for it, or without calibration by its cap."""
        info, top = calls.attention_info(match), share_of(candidate)
        if _is_corrected(candidate):
            return [calls.corrected_call(info, scenario, top=top)]
        density = match.extra.get("density")
        return [
            calls.kept_tiles_call(info, scenario, top, mass=mass_of(candidate), density=density)
        ]

    @property
    def idle(self) -> str:
        return "no tile of the calibration prompts is left out: longer ones would tell"

    def varies(self, candidate: Candidate) -> bool:
        return mass_of(candidate) > 0

    def density(self, match: Match, candidate: Candidate, inputs: Mapping[str, Any]) -> Tensor:
        """Of the key tiles before the queries of the recorded prompts, without the last two tiles
        of these, the part that is kept: [KV], the mean of a KV head's query heads."""
        k = inputs["k"]
        prompt = inputs.get("prompt") or inputs["q"].shape[2]
        kept = torch.zeros(k.shape[1], dtype=torch.float64, device=k.device)
        every = 0
        if not hides(prompt, k.shape[2] - inputs["q"].shape[2] + prompt, mass_of(candidate)):
            return kept + 1.0
        for number in range(tiles(prompt) - SPARED):
            chosen = tiles_of(candidate, inputs, number, _choice(candidate))
            kept += chosen.sum((0, 2, 3, 4))
            every += chosen[:, 0].numel()
        return kept / every

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
        """Every head of the op under this choice, tokens past the prompt seeing all keys."""
        options = {"top": [share_of(candidate)], "mass": [mass_of(candidate)]}
        options["delta"] = tensors["share"].tolist() if _is_corrected(candidate) else [0]
        return emulation.attended_as_decoded(inputs, **options)

    def is_mask(self, candidate: Candidate) -> bool:
        return not _is_corrected(candidate)

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        return kept_mass(candidate, inputs, rows, _choice(candidate))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        set_option(match, "top", share_of(candidate), editor)
        if mass_of(candidate):
            set_option(match, "mass", mass_of(candidate), editor)
        if _is_corrected(candidate):
            info = calls.attention_info(match)
            corrected.apply(match.site, info, tensors["share"], editor)


def _choice(candidate: Candidate) -> Choose:
    return partial(chosen_tiles, mass=[mass_of(candidate)])


def _is_corrected(candidate: Candidate) -> bool:
    return "delta" in candidate.parameters
