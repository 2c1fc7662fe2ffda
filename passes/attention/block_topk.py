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
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.delta import EVERY
from fxopt.kernels.block_topk.reference import (
    LEAST,
    SPARED,
    TILE,
    chosen_tiles,
    hides,
    hides_some,
    tiles,
)
from fxopt.passes.attention import calls, corrected, emulation, mass


@dataclass(frozen=True)
class BlockTopk:
    """`shares` are per mille of the key tiles before a query; one is offered where the workload's
    longest prompt computes at most `most` of its pairs under it, and fewer than under the next
    larger share. Where these are at most `corrected`, it is offered corrected as well, by rows that
    see all keys; see `corrected.py`. `masses` are per mille of the estimated attention, for which
    at most `cap` per mille of the tiles are kept; they are offered where under the cap at most
    `most` of the pairs are computed."""

    shares: tuple[int, ...] = (50, 100, 200)
    masses: tuple[int, ...] = (900, 950)
    cap: int = 400
    most: float = 0.6
    corrected: float = 0.3

    name: ClassVar[str] = "attention.block_topk"
    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward", "generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15486"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUTS})
    near: ClassVar[bool] = False
    decoding: ClassVar[bool] = False

    def match(self, site: Site) -> Match | Refusal:
        if reason := calls.refusal(site):
            return reason
        info = calls.attention_info(Match(site))
        if not info.causal:
            return Refusal("attention is not causal: tiles are chosen among those before a query")
        if info.has_bias:
            return Refusal("a bias is added to the scores: the estimate does not know it")
        if info.window:
            return Refusal(f"the model itself attends only within {info.window} tokens")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return (
            [
                Candidate(self.name, f"top{share / 10:g}%", {"top": share})
                for share in self._fitting(scenarios)
            ]
            + [
                Candidate(
                    self.name,
                    f"top{share / 10:g}%{corrected.SUFFIX}",
                    {"top": share, "delta": EVERY},
                )
                for share in self._fitting(scenarios, self.corrected)
            ]
            + [
                Candidate(self.name, f"mass{mass / 10:g}%", {"mass": mass, "top": self.cap})
                for mass in self._fitting_masses(scenarios)
            ]
        )

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self._fitting(scenarios) or self._fitting_masses(scenarios):
            return None
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            queries = max((scenario.queries for scenario in scenarios), default=0)
            return (
                f"no call of the workload brings more than {queries} tokens, and the last "
                f"{SPARED * TILE} of a call see all keys"
            )
        least, left = min(self.shares), _density(prompt, min(self.shares))
        return (
            f"the longest prompt has {prompt.queries} tokens: with {least / 10:g}% of its tiles, "
            f"but at least {LEAST} of {TILE} keys, {left:.0%} of the attention would still be "
            f"computed, and it pays below {self.most:.0%}"
        )

    def _fitting(self, scenarios: Sequence[Scenario], most: float | None = None) -> list[int]:
        """The shares under which at most `most` of the longest prompt's pairs are computed."""
        most = self.most if most is None else most
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            return []
        # Where LEAST tiles are more than any share, all shares are one candidate.
        by_density = {_density(prompt, share): share for share in sorted(self.shares)}
        return sorted(share for density, share in by_density.items() if density <= most)

    def _fitting_masses(self, scenarios: Sequence[Scenario]) -> list[int]:
        """The parts of the attention that may be cheap to keep in the longest prompt."""
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            return []
        return [
            mass
            for mass in sorted(self.masses)
            if hides_some(prompt.queries, prompt.length, self.cap, mass)
            and _density(prompt, self.cap, mass) <= self.most
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts by the pairs that are computed and the estimate; decoding is dense. A part of
        the attention by the tiles that are expected for it, or without calibration by its cap."""
        info, top = calls.attention_info(match), _top(candidate)
        if _is_corrected(candidate):
            return [calls.corrected_call(info, scenario, top=top)]
        density = match.extra.get("density")
        return [calls.kept_tiles_call(info, scenario, top, _mass(candidate), density)]

    def varies(self, candidate: Candidate) -> bool:
        return _mass(candidate) > 0

    def density(self, match: Match, candidate: Candidate, inputs: Mapping[str, Any]) -> Tensor:
        """Of the key tiles before the queries of the recorded prompts, without the last two tiles
        of these, the part that is kept: [KV], the mean of a KV head's query heads."""
        k = inputs["k"]
        prompt = inputs.get("prompt") or inputs["q"].shape[2]
        kept = torch.zeros(k.shape[1], dtype=torch.float64, device=k.device)
        every = 0
        if not hides(prompt, k.shape[2] - inputs["q"].shape[2] + prompt, _mass(candidate)):
            return kept + 1.0
        for number in range(tiles(prompt) - SPARED):
            chosen = _chosen(inputs, number, candidate)
            kept += chosen.sum((0, 2, 3, 4))
            every += chosen[:, 0].numel()
        return kept / every

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        if not _is_corrected(candidate):
            return {}
        return corrected.shares(statistics, top=[_top(candidate)])

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Every head of the op under this choice, tokens past the prompt seeing all keys."""
        options = {"top": [_top(candidate)], "mass": [_mass(candidate)]}
        options["delta"] = tensors["share"].tolist() if _is_corrected(candidate) else [0]
        return emulation.attended_as_decoded(inputs, **options)

    def is_mask(self, candidate: Candidate) -> bool:
        return not _is_corrected(candidate)

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        return mass.kept(inputs, rows, _visible(inputs, rows, candidate))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, info = match.site, calls.attention_info(match)
        top = calls.with_value(site, editor, "top", _top(candidate), info.num_kv_heads)
        editor.update(site, top=top)
        if _mass(candidate):
            part = calls.with_value(site, editor, "mass", _mass(candidate), info.num_kv_heads)
            editor.update(site, mass=part)
        if _is_corrected(candidate):
            corrected.apply(site, info, tensors["share"], editor)


def _top(candidate: Candidate) -> int:
    return int(candidate.parameters["top"])


def _mass(candidate: Candidate) -> int:
    return int(candidate.parameters.get("mass", 0))


def _is_corrected(candidate: Candidate) -> bool:
    return "delta" in candidate.parameters


def _visible(inputs: Mapping[str, Any], rows: Tensor, candidate: Candidate) -> Tensor:
    """The keys of the tiles that each of the queries `rows` [R] keeps: bool [B, H, R, T].

    Only tiles of queries that have one of them are estimated.
    """
    q, k = inputs["q"], inputs["k"]
    (batch, heads, queries), keys = q.shape[:3], k.shape[2]
    prompt = inputs.get("prompt") or queries
    past = keys - queries
    visible = torch.ones(batch, heads, len(rows), keys, dtype=torch.bool, device=q.device)
    if not hides(prompt, prompt + past, _mass(candidate)):
        return visible
    for number in (rows // TILE).unique().tolist():
        if number >= tiles(prompt) - SPARED:
            continue
        end = (number + 1) * TILE + past
        chosen = _chosen(inputs, number, candidate)
        kept = chosen.flatten(1, 3).repeat_interleave(TILE, 2)[:, :, :end]
        visible[:, :, rows // TILE == number, :end] = kept[:, :, None]
    return visible


def _chosen(inputs: Mapping[str, Any], number: int, candidate: Candidate) -> Tensor:
    """The key tiles that a tile of the prompt's queries keeps, bool [B, KV, H / KV, 1, tiles]."""
    q, k, mask = inputs["q"], inputs["k"], inputs.get("mask")
    start, end = number * TILE, (number + 1) * TILE + k.shape[2] - q.shape[2]
    return chosen_tiles(
        q[:, :, start : start + TILE], k[:, :, :end], None if mask is None else mask[:, :end],
        inputs["scale"], inputs.get("softcap", 0.0), [_top(candidate)], [_mass(candidate)], 0,
    )  # fmt: skip


def _density(prompt: Scenario, share: int, mass: int = 0) -> float:
    """Part of the pairs of causal attention that is computed, at most."""
    every = calls.visible_pairs(prompt.queries, prompt.length, True, 0, 0)
    return calls.kept_pairs(prompt.queries, prompt.length, share, mass) / every
