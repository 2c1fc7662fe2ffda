"""Attention -> in prompts, key tiles whose largest score cannot matter are left out on the way.

    attend(q, k, v, mask, causal=True)
    attend(q, k, v, mask, causal=True, skip=(420, 395, 0, 0))    # two query heads, in 0.01 nats

The scores of all tiles are computed, and of those that lie far below what a row has seen before
neither exponentials nor the product with the values (BLASST). No estimate goes before, so nothing
is missed that only some queries look for; but at most half of the products are saved. Pays where
the dense kernel is no faster than the one that can leave out, or where a half of the tiles goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import AttentionInfo, Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention import skip as skips
from fxopt.kernels.attention.spec import per_head
from fxopt.passes.attention import calls, emulation, mass
from fxopt.passes.attention.corrected import prompt_of


@dataclass(frozen=True)
class SkipSoftmax:
    """`shares` are per mille of the key tiles that may be left out, which the limits of calibration
    leave out; one is offered where what is left of the longest prompt takes less than the dense
    time at `slower`, the time of the kernel that leaves out over that of the library's, both
    without a mask. Of a head in which calibration shows fewer than `least` such tiles, or the share
    lies below nothing, nothing is left out."""

    shares: tuple[int, ...] = (300, 500)
    slower: float = 1.2
    least: int = 100

    name: ClassVar[str] = "attention.skip_softmax"
    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward", "generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.12087"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUTS})
    near: ClassVar[bool] = False
    decoding: ClassVar[bool] = False

    def match(self, site: Site) -> Match | Refusal:
        if reason := calls.refusal(site):
            return reason
        info = calls.attention_info(Match(site))
        if not info.causal:
            return Refusal("attention is not causal: tiles are left out behind the diagonal")
        if info.has_bias:
            return Refusal("a bias is added to the scores: what it hides is not known")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            return []
        info = calls.attention_info(match)
        return [
            Candidate(self.name, f"skip{share / 10:g}%", {"skipped": share})
            for share in sorted(self.shares)
            if self._time(info, prompt, share) < 1.0
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            queries = max((scenario.queries for scenario in scenarios), default=0)
            return (
                f"no call of the workload brings more than {queries} tokens, and calls of at most "
                f"{skips.LEAST_QUERIES} leave nothing out"
            )
        info, most = calls.attention_info(match), max(self.shares)
        visited, may = skips.tiles(prompt.queries, prompt.length, info.window)
        products = calls.skipping_products(info, prompt, 1 - most / 1000)
        return (
            f"{may} of the {visited} tiles of the longest prompt may be left out: without "
            f"{most / 10:g}% of them, of which the scores are computed all the same, attention "
            f"makes {products:.0%} of its products, in a kernel that takes "
            f"{self._slower(info):g} times the time of dense calls: "
            f"{self._time(info, prompt, most):.2f} of the dense time"
        )

    def _slower(self, info: AttentionInfo) -> float:
        """Dense calls are the library's if it has them."""
        return 1.0 if info.softcap or info.has_sinks or info.window else self.slower

    def _time(self, info: AttentionInfo, prompt: Scenario, share: int) -> float:
        """What is left of the dense time."""
        return self._slower(info) * calls.skipping_products(info, prompt, 1 - share / 1000)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts by all scores and the products with the values of what is expected to be left,
        without calibration all; decoding is dense."""
        info = calls.attention_info(match)
        density = float(match.extra.get("density", 1.0))
        return [calls.skipping_call(info, scenario, density)]

    @property
    def idle(self) -> str:
        """Why a candidate under which no tile of the calibration data is left out is none."""
        return (
            f"in no query head does calibration show {self.least} tiles that may be left out and "
            "the share of them below what is seen before"
        )

    def varies(self, candidate: Candidate) -> bool:
        return True

    def density(self, match: Match, candidate: Candidate, inputs: Mapping[str, Any]) -> Tensor:
        """Of the key tiles of the recorded prompts that may be left out the part that is not: [KV],
        the mean of a KV head's query heads."""
        found = _found(inputs)
        limit = skips.limits(self._limits(found, candidate), torch.float64, torch.device("cpu"))
        left = [
            1 - (gap > nats).sum().item() / max(len(gap), 1)
            for gap, nats in zip(found, limit.tolist(), strict=True)
        ]
        by_head = torch.tensor(left, dtype=torch.float64)
        return by_head.unflatten(0, (inputs["k"].shape[1], -1)).mean(1)

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        """Limits as "limit", int32 [H]: hundredths of a nat, 0 where nothing is left out."""
        found = statistics.once("gaps", lambda: _found(statistics.inputs))
        return {"limit": torch.tensor(self._limits(found, candidate), dtype=torch.int32)}

    def _limits(self, found: Sequence[Tensor], candidate: Candidate) -> list[int]:
        """Of each head the least limit under which at most the share of the tiles that may go is
        left out; 0 where fewer lie below what is seen before, or too few were seen."""
        share = int(candidate.parameters["skipped"])
        few = [len(gap) < self.least for gap in found]
        # At the place of the share: the one tile more that is kept.
        nats = [
            0.0 if none else gap[share * len(gap) // 1000].item()
            for gap, none in zip(found, few, strict=True)
        ]
        return [math.ceil(least / skips.UNIT) if least > 0 else 0 for least in nats]

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Every head of the op under its limit, tokens past the prompt seeing all keys."""
        return emulation.attended_as_decoded(inputs, skip=tensors["limit"].tolist())

    def is_mask(self, candidate: Candidate) -> bool:
        return True

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        limit = self._limits(_found(inputs), candidate)
        return mass.kept(inputs, rows, _visible(inputs, rows, limit))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, info = match.site, calls.attention_info(match)
        given: Any = editor.node(site).kwargs.get("skip", (0,))
        values = per_head("skip", given, info.num_heads, "query heads")
        group = info.num_heads // info.num_kv_heads
        for head in range(info.num_kv_heads) if site.head is None else (site.head,):
            own = slice(head * group, (head + 1) * group)
            values[own] = tensors["limit"][own].tolist()
        editor.update(site, skip=tuple(values))


def _found(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Of each query head how far below what is seen before those tiles lie that may be left out,
    in nats, the farthest first. Of prompts alone, and of no queries that are padding."""
    prompt = prompt_of(inputs)
    (heads, queries), keys, mask = prompt["q"].shape[1:3], prompt["k"].shape[2], prompt["mask"]
    found: list[list[Tensor]] = [[prompt["q"].new_zeros(0)] for _ in range(heads)]
    for start in range(0, queries if queries > skips.LEAST_QUERIES else 0, skips.QUERY_TILE):
        gap, may = _gaps(prompt, start)
        if mask is not None:
            own = mask[:, keys - queries + start :][:, : skips.QUERY_TILE] != 0
            may = may & own.any(1)[:, None, None]
        for head, kept in enumerate(found):
            kept.append(gap[:, head][may[:, head]])
    return [torch.cat(kept).sort(descending=True).values for kept in found]


def _gaps(inputs: Mapping[str, Any], start: int) -> tuple[Tensor, Tensor]:
    """`skips.gaps` of one tile of queries, [B, H, key tiles] each."""
    q, k = inputs["q"], inputs["k"]
    stop = min(start + skips.QUERY_TILE, q.shape[2])
    rows = torch.arange(start, stop, device=q.device)
    seen = mass.seen(inputs, rows, inputs.get("window", (0,)), inputs.get("sink_tokens", (0,)))
    scores = mass.scores(inputs, rows, seen)
    window = torch.tensor(per_head("window", inputs.get("window", (0,)), k.shape[1]))
    window = window.repeat_interleave(q.shape[1] // k.shape[1])[None, :, None, None]
    sinks = inputs.get("sinks")
    logit = None if sinks is None else sinks.to(scores.dtype)[:, None, None]
    gap, may = skips.gaps(
        scores, rows + k.shape[2] - q.shape[2], k.shape[2], inputs.get("mask"),
        window.to(q.device), logit,
    )  # fmt: skip
    return gap[:, :, 0], may.expand_as(gap)[:, :, 0]


def _visible(inputs: Mapping[str, Any], rows: Tensor, limit: Sequence[int]) -> Tensor:
    """The keys of the tiles that the queries `rows` [R] do not leave out: bool [B, H, R, T]."""
    (batch, heads), keys, prompt = inputs["q"].shape[:2], inputs["k"].shape[2], prompt_of(inputs)
    visible = torch.ones(batch, heads, len(rows), keys, dtype=torch.bool, device=rows.device)
    queries, end = prompt["q"].shape[2], prompt["k"].shape[2]
    if queries <= skips.LEAST_QUERIES:
        return visible
    for number in (rows[rows < queries] // skips.QUERY_TILE).unique().tolist():
        gap, may = _gaps(prompt, number * skips.QUERY_TILE)
        nats = skips.limits(limit, gap.dtype, gap.device)[:, None]
        out = (may & (gap > nats)).repeat_interleave(skips.KEY_TILE, 2)[..., :end]
        chosen = (rows // skips.QUERY_TILE == number) & (rows < queries)
        visible[:, :, chosen, :end] = ~out[:, :, None]
    return visible
