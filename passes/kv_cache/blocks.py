"""KV cache -> blocks of 8, 4 or 2-bit integers or e4m3, the newest tokens and a sink kept exactly.

    out = attend(q, k, v, mask, state=state, start=start, ...)
    out = attend(q, k, v, mask, state=state, start=start, ..., layout="k4v4g64r64s4")

Keys are quantised per channel over a block of tokens, values per token (KIVI). At 8 bits e4m3
numbers ("f8") lose more than integers, but values need no zero then. What is attended
in the call that brings it is exact (past-only quantisation, WKVQuant, arXiv 2402.12065). Pays in
cache bytes, and in decoding where those bytes bound the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.ops import attend_as_decoded
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import AttentionInfo, Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.kv_attention.layout import Blocks as Format
from fxopt.kernels.kv_attention.layout import to_bits, with_head
from fxopt.kernels.kv_attention.packing import FLOAT8, Bits, width
from fxopt.passes.kv_cache import calls

_NAMES = ("key_bits", "value_bits", "group", "residual", "sink")


@dataclass(frozen=True)
class Blocks:
    """`bits` are (K, V) pairs; keys are the more sensitive side. Keys of 8 bits take only the
    largest of `groups`, where a smaller one would hardly lower the error. `residual` and
    `sink` are for caches that grow: the keys of cross-attention are stored once and packed whole,
    but for the last tokens that fill no block."""

    bits: tuple[tuple[Bits, Bits], ...] = (
        (8, 8), (8, FLOAT8), (FLOAT8, FLOAT8), (8, 4), (4, 4), (4, 2), (2, 2),
    )  # fmt: skip
    groups: tuple[int, ...] = (64, 128)
    residual: int = 64
    sink: int = 4

    name: ClassVar[str] = "kv_cache.blocks"
    family: ClassVar[Family] = "kv_cache"
    workloads: ClassVar[frozenset[str]] = frozenset({"generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    rounds: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02750"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUTS})

    def match(self, site: Site) -> Match | Refusal:
        info = site.info
        if not isinstance(info, AttentionInfo) or site.head is None:
            return Refusal(f"{site.family} site: the rewrite serves the KV cache of one head")
        if site.blocked is not None:
            return Refusal(site.blocked)
        if not info.cached:
            return Refusal("this attention reads no cache while generating")
        if not info.causal and not info.cross:
            return Refusal("attention is not causal, so the past changes with each new token")
        reasons = [
            self._format(info, pair, self.groups[0]).refusal(info.head_dim) for pair in self.bits
        ]
        if all(reasons):
            return Refusal(str(reasons[0]))
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [] if self.refusal(match, scenarios) else self._candidates(match, scenarios)

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self._candidates(match, scenarios):
            return None
        group = min(self.groups)
        if calls.attention_info(match).cross:
            return (
                f"the encoder's result has {_longest(scenarios)} tokens, fewer than a block of "
                f"{group}: nothing would be stored smaller"
            )
        return (
            f"the workload ends at {_longest(scenarios)} tokens and the first block is packed at "
            f"{self.sink + self.residual + group} ({self.sink} sink + {self.residual} residual + "
            f"a block of {group}): nothing would be stored smaller"
        )

    def _candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info, length = calls.attention_info(match), _longest(scenarios)
        found: list[Candidate] = []
        for pair in self.bits:
            formats = [self._format(info, pair, group) for group in sorted(self.groups)]
            fitting = [
                fmt for fmt in formats if fmt.packed(length) and not fmt.refusal(info.head_dim)
            ]
            found += map(self._candidate, fitting[-1:] if width(pair[0]) == 8 else fitting)
        return found

    def _candidate(self, fmt: Format) -> Candidate:
        return Candidate(self.name, str(fmt), {name: getattr(fmt, name) for name in _NAMES})

    def _format(self, info: AttentionInfo, bits: tuple[Bits, Bits], group: int) -> Format:
        """What never grows is packed at once, all of it that fills a block."""
        residual, sink = (0, 0) if info.cross else (self.residual, self.sink)
        return Format(*bits, group, residual, sink)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Decoding: attention that reads the packed cache, in place of the exact attention's call
        and within the site's window. Prefill: packing, beside it."""
        info = calls.attention_info(match)
        return calls.cached_calls(info, _format_of(candidate), scenario, info.window)

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
        """Every head of the op stored alike, its tokens from "prompt" on decoded one by one."""
        with torch.no_grad():
            arguments: dict[str, Any] = {**inputs, "layout": str(_format_of(candidate))}
            return attend_as_decoded(**arguments)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, info = match.site, calls.attention_info(match)
        assert site.head is not None
        text = str(editor.node(site).kwargs.get("layout", ""))
        layout = with_head(text, site.head, _format_of(candidate), info.num_kv_heads)
        editor.update(site, layout=layout)


def exact_calls(info: AttentionInfo, scenario: Scenario) -> list[OpCall]:
    """The cache of one KV head as it is: the price of keeping it."""
    return calls.cached_calls(info, None, scenario, info.window)


def _format_of(candidate: Candidate) -> Format:
    key, value, *sizes = (candidate.parameters[name] for name in _NAMES)
    return Format(to_bits(key), to_bits(value), *map(int, sizes))


def _longest(scenarios: Sequence[Scenario]) -> int:
    """Tokens in the cache at the end of the longest call."""
    return max((scenario.length for scenario in scenarios), default=0)
