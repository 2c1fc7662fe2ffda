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
    """`shares` are per mille of the key tiles before a query, which the limits of calibration leave
    out; one is offered where what is left takes less than the dense time at `slower`, the time of
    the kernel that leaves out over that of the library's, both without a mask."""

    shares: tuple[int, ...] = (300, 500)
    slower: float = 1.2

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
        if calls.longest_prompt(scenarios) is None:
            return []
        info = calls.attention_info(match)
        return [
            Candidate(self.name, f"skip{share / 10:g}%", {"skipped": share})
            for share in sorted(self.shares)
            if self._time(info, share) < 1.0
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        if calls.longest_prompt(scenarios) is None:
            queries = max((scenario.queries for scenario in scenarios), default=0)
            return (
                f"no call of the workload brings more than {queries} tokens, and calls of at most "
                f"{skips.LEAST_QUERIES} leave nothing out"
            )
        info, most = calls.attention_info(match), max(self.shares)
        return (
            f"without {most / 10:g}% of its tiles, of which the scores are computed all the same, "
            f"attention makes {_products(info, 1 - most / 1000):.0%} of its products, in a kernel "
            f"that takes {self.slower:g} times the library's time: "
            f"{self._time(info, most):.2f} of the dense time"
        )

    def _time(self, info: AttentionInfo, share: int) -> float:
        """What is left of the dense time, where dense calls are the library's if it has them."""
        library = not (info.softcap or info.has_sinks or info.window)
        return (self.slower if library else 1.0) * _products(info, 1 - share / 1000)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts by all scores and the products with the values of what is expected to be left;
        decoding is dense."""
        info = calls.attention_info(match)
        density = float(match.extra.get("density", 1 - _share(candidate)))
        return [calls.skipping_call(info, scenario, density)]

    def varies(self, candidate: Candidate) -> bool:
        return True

    def density(self, match: Match, candidate: Candidate, inputs: Mapping[str, Any]) -> Tensor:
        """The part of the key tiles before the queries of the recorded prompts that is not left
        out: [KV], the mean of a KV head's query heads."""
        found, every = _found(inputs)
        limit = _limits(found, every, _share(candidate))
        out = torch.stack([(gap > s / 100).sum() for gap, s in zip(found, limit, strict=True)])
        return 1 - out.double().unflatten(0, (inputs["k"].shape[1], -1)).mean(1) / max(every, 1)

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        """Limits as "limit", int32 [H]: hundredths of a nat, at least one."""
        found, every = statistics.once("gaps", lambda: _found(statistics.inputs))
        limit = _limits(found, every, _share(candidate))
        return {"limit": torch.tensor(limit, dtype=torch.int32)}

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
        limit = _limits(*_found(inputs), _share(candidate))
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


def _share(candidate: Candidate) -> float:
    return int(candidate.parameters["skipped"]) / 1000


def _products(info: AttentionInfo, density: float) -> float:
    """Part of the products of dense attention that is made where `density` of the tiles is left."""
    return (info.head_dim + info.value_dim * density) / (info.head_dim + info.value_dim)


def _found(inputs: Mapping[str, Any]) -> tuple[list[Tensor], int]:
    """Of each query head how far below what is seen before those tiles lie that may be left out,
    in nats, the farthest first; and how many tiles a head visits in all. Of prompts alone."""
    prompt = prompt_of(inputs)
    found: list[list[Tensor]] = [[prompt["q"].new_zeros(0)] for _ in range(prompt["q"].shape[1])]
    every, queries = 0, prompt["q"].shape[2]
    for start in range(0, queries if queries > skips.LEAST_QUERIES else 0, skips.QUERY_TILE):
        gap, may, seen = _gaps(prompt, start)
        for head, kept in enumerate(found):
            kept.append(gap[:, head][may[:, head]])
        every += seen
    return [torch.cat(kept).sort(descending=True).values for kept in found], every


def _limits(found: Sequence[Tensor], every: int, share: float) -> list[int]:
    """Of each head the least limit under which at most `share` of the tiles is left out."""
    place = math.floor(share * every)
    least = [gap[place].item() if place < len(gap) else 0.0 for gap in found]
    return [max(1, math.ceil(nats / skips.UNIT)) if nats > 0 else 1 for nats in least]


def _gaps(inputs: Mapping[str, Any], start: int) -> tuple[Tensor, Tensor, int]:
    """`skips.gaps` of one tile of queries, [B, H, key tiles] each, and the number of tiles that
    they see."""
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
    may = may.expand_as(gap)[:, :, 0]
    visited = -(-(int(rows[-1]) + 1 + k.shape[2] - q.shape[2]) // skips.KEY_TILE)
    return gap[:, :, 0], may, q.shape[0] * visited


def _visible(inputs: Mapping[str, Any], rows: Tensor, limit: Sequence[int]) -> Tensor:
    """The keys of the tiles that the queries `rows` [R] do not leave out: bool [B, H, R, T]."""
    (batch, heads), keys, prompt = inputs["q"].shape[:2], inputs["k"].shape[2], prompt_of(inputs)
    visible = torch.ones(batch, heads, len(rows), keys, dtype=torch.bool, device=rows.device)
    queries, end = prompt["q"].shape[2], prompt["k"].shape[2]
    if queries <= skips.LEAST_QUERIES:
        return visible
    for number in (rows[rows < queries] // skips.QUERY_TILE).unique().tolist():
        gap, may, _ = _gaps(prompt, number * skips.QUERY_TILE)
        nats = skips.limits(limit, gap.dtype, gap.device)[:, None]
        out = (may & (gap > nats)).repeat_interleave(skips.KEY_TILE, 2)[..., :end]
        chosen = (rows // skips.QUERY_TILE == number) & (rows < queries)
        visible[:, :, chosen, :end] = ~out[:, :, None]
    return visible
