"""Attention -> decoded tokens read the tiles of the cache of the most estimated attention.

    out = attend(q, k, v, mask, state=state, start=start, ...)
    out = attend(q, k, v, mask, state=state, start=start, ..., layout="exact+t4096")
    out = attend(q, k, v, mask, state=state, start=start, ..., layout="exact+t4096/8")

Pays where a long past bounds a decoding step by what it reads, in heads that fetch from afar but
from few places: a window of equal cost loses those. The tiles are chosen anew for each token and
KV head, as Quest does, by the range of each channel of a tile's keys. In long pasts reading these
ranges costs as much as what is then read; where a choice is kept for some tokens, as HiP Attention
keeps its masks, that falls to one of them, and the others read what a query before theirs chose.
Prompts attend as they did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.decode_topk.reference import TILE
from fxopt.kernels.kv_attention.decoded import keys_read
from fxopt.kernels.kv_attention.layout import HeadClass, Layout, with_top_keys
from fxopt.passes.attention import calls, emulation, mass
from fxopt.passes.kv_cache.calls import cached_calls, hidden_keys


@dataclass(frozen=True)
class DecodeTopk:
    """`top_keys` are tokens that a decoded one reads of whole tiles; a number is offered where the
    workload's longest past is read to at most `most` of it. Kept for each of `refreshes` tokens it
    is offered as well, where that saves at least `gain` of what is read of an exact cache."""

    top_keys: tuple[int, ...] = (1024, 2048, 4096)
    most: float = 0.5
    refreshes: tuple[int, ...] = (8,)
    gain: float = 0.15

    name: ClassVar[str] = "attention.decode_topk"
    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUTS})
    near: ClassVar[bool] = False
    decoding: ClassVar[bool] = True

    def match(self, site: Site) -> Match | Refusal:
        if reason := calls.refusal(site):
            return reason
        info = calls.attention_info(Match(site))
        if not info.cached or site.head is None:
            return Refusal("this attention reads no cache while generating")
        if not info.causal:
            return Refusal("attention is not causal, so the past changes with each new token")
        if info.has_bias:
            return Refusal("a bias is added to the scores: the estimate does not know it")
        if info.window:
            return Refusal(f"the model itself attends only within {info.window} tokens")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        fitting = [
            top_keys
            for top_keys in sorted(self.top_keys)
            if self._density(match, scenarios, top_keys) <= self.most
        ]
        return [
            Candidate(self.name, f"top{top_keys}", {"top_keys": top_keys}) for top_keys in fitting
        ] + [
            Candidate(
                self.name, f"top{top_keys}/{refresh}", {"top_keys": top_keys, "refresh": refresh}
            )
            for top_keys in fitting
            for refresh in sorted(self.refreshes)
            if _saved(scenarios, top_keys, refresh) >= self.gain
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        least = min(self.top_keys)
        density = self._density(match, scenarios, least)
        if density <= self.most:
            return None
        longest = max((s.past for s in scenarios if s.queries == 1), default=0)
        return (
            f"the longest past of a decoded token has {longest} tokens: with {least} of them it "
            f"would still read {density:.0%}, and it pays up to {self.most:.0%}"
        )

    def _density(self, match: Match, scenarios: Sequence[Scenario], top_keys: int) -> float:
        """Part of its past that a decoded token of the longest one reads."""
        info = replace(calls.attention_info(match), top_keys=top_keys)
        steps = [scenario for scenario in scenarios if scenario.past]
        read = (1.0 - hidden_keys(info, None, step) / step.length for step in steps)
        return min(read, default=1.0)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Prompts are dense; decoding is the call of the cache, which reads what is kept."""
        info = calls.attention_info(match)
        if not scenario.past:
            return [calls.attention_call(info, scenario)]
        top_keys, refresh = _top_keys(candidate), _refresh(candidate)
        return cached_calls(replace(info, top_keys=top_keys, refresh=refresh), None, scenario)

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
        """Every head of the op read so by the tokens from "prompt" on, each with its own query or
        that of the one that chooses for it."""
        layout = Layout((HeadClass((), None, _top_keys(candidate), _refresh(candidate)),))
        return emulation.attended_as_decoded(inputs, layout=str(layout))

    def is_mask(self, candidate: Candidate) -> bool:
        return True

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        """Of the tokens that each query reads, those of the prompt all."""
        q, k, prompt = inputs["q"], inputs["k"], inputs["prompt"]
        top_keys, scale = _top_keys(candidate), inputs["scale"]
        read = keys_read(
            q, k, inputs.get("mask"), rows, None, top_keys, scale, _refresh(candidate), prompt
        )
        read |= (rows < prompt)[:, None]
        return mass.kept(inputs, rows, read.repeat_interleave(q.shape[1] // k.shape[1], 1))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, count = match.site, calls.attention_info(match).num_kv_heads
        assert site.head is not None
        text = str(editor.node(site).kwargs.get("layout", ""))
        top_keys, refresh = _top_keys(candidate), _refresh(candidate)
        editor.update(site, layout=with_top_keys(text, site.head, top_keys, count, refresh))


def _top_keys(candidate: Candidate) -> int:
    return int(candidate.parameters["top_keys"])


def _refresh(candidate: Candidate) -> int:
    """For how many tokens a choice is kept."""
    return int(candidate.parameters.get("refresh", 1))


def _saved(scenarios: Sequence[Scenario], top_keys: int, refresh: int) -> float:
    """Part of what a token of the longest past reads of an exact cache that keeping spares: the
    ranges of each tile are as much as one of its keys and that one's value."""
    ranges = max((s.past for s in scenarios), default=0) // TILE
    return (1 - 1 / refresh) * ranges / (ranges + top_keys)
