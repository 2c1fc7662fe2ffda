"""Attention -> a sliding window, with a sink of first tokens where it is causal.

    attend(q, k, v, mask, causal=True)
    attend(q, k, v, mask, causal=True, window=(512, 0), sink_tokens=(16, 0))    # KV head 0 only
    attend(q, k, v, mask, window=(256, 0), dilation=(2, 1))    # every other token, in an encoder

Pays from the length at which T / (window + sink) outweighs the library's faster dense kernel,
in the heads that look back no further (StreamingLLM's sink; SWAT; NATTEN's 1-D neighbourhood for
encoders, and Longformer's dilated window). Heads that fetch from afar keep their dense attention:
each KV head is its own site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import Family, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.attention import calls, corrected, emulation, mass


@dataclass(frozen=True)
class Window:
    """`windows` count keys, the query's own included; a window is offered where the longest call
    is more than twice as long. `sink` first tokens stay visible to causal heads. Where a window
    leaves at most `corrected` of the longest prompt's pairs, it is offered for prompts alone as
    well, corrected by rows that see all keys; see `corrected.py`. Tokens that are neither causal
    nor places of a grid are offered the smallest window under each of `dilations` too, where more
    than twice as many of them leave one rest."""

    windows: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    sink: int = 16
    corrected: float = 0.3
    dilations: tuple[int, ...] = (2, 4)

    name: ClassVar[str] = "attention.window"
    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward", "generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUTS})
    near: ClassVar[bool] = True
    decoding: ClassVar[bool] = False

    def match(self, site: Site) -> Match | Refusal:
        if reason := calls.refusal(site):
            return reason
        info = calls.attention_info(Match(site))
        if info.has_bias:
            return Refusal("a bias is added to the scores: a far key may be the wanted one")
        if 0 < info.window <= min(self.windows):
            return Refusal(f"the model itself attends only within {info.window} tokens")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        sink = self.sink if calls.attention_info(match).causal else 0
        fitting = self._fitting(match, scenarios)
        plain = [
            Candidate(
                self.name,
                f"w{window}+s{sink}" if sink else f"w{window}",
                {"window": window, "sink": sink},
            )
            for window in fitting
        ]
        fixed = [
            Candidate(
                self.name,
                f"w{window}+s{sink}{corrected.SUFFIX}",
                # Not "window": decoded tokens see the whole cache.
                {"prompt_window": window, "sink": sink},
            )
            for window in fitting
            if self._pays_corrected(match, scenarios, window)
        ]
        spread = [
            Candidate(
                self.name,
                f"w{window}/{dilation}",
                {"window": window, "sink": 0, "dilation": dilation},
            )
            for window in fitting[:1]
            for dilation in self._spreads(match, scenarios, window)
        ]
        return plain + fixed + spread

    def _spreads(self, match: Match, scenarios: Sequence[Scenario], window: int) -> list[int]:
        info = calls.attention_info(match)
        if info.causal or info.cached or info.grid or info.window:
            return []
        return [d for d in self.dilations if 2 * window < _longest(scenarios) // d]

    def _pays_corrected(self, match: Match, scenarios: Sequence[Scenario], window: int) -> bool:
        info, prompt = calls.attention_info(match), calls.longest_prompt(scenarios)
        if prompt is None or not info.causal or info.window:
            return False
        every, left = (
            calls.visible_pairs(prompt.queries, prompt.length, True, reach, self.sink)
            for reach in (0, window)
        )
        return left <= self.corrected * every

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self._fitting(match, scenarios):
            return None
        return (
            f"the workload's longest sequence has {_longest(scenarios)} tokens, and the smallest "
            f"window, {min(self.windows)}, pays beyond {2 * min(self.windows)}"
        )

    def _fitting(self, match: Match, scenarios: Sequence[Scenario]) -> list[int]:
        own, longest = calls.attention_info(match).window, _longest(scenarios)
        reach = min(own, longest) if own else longest
        return [window for window in sorted(self.windows) if 2 * window < reach]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """A corrected window by what it computes of prompts; decoding is dense then."""
        info, (window, sink) = calls.attention_info(match), _choice(candidate)
        if (dilation := _dilation(candidate)) > 1:
            return [calls.dilated_call(info, scenario, window, dilation)]
        price = calls.corrected_call if _is_corrected(candidate) else calls.attention_call
        return [price(info, scenario, window, sink)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        if not _is_corrected(candidate):
            return {}
        return corrected.shares(statistics, **_options(candidate))

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Every head of the op under this window."""
        if not _is_corrected(candidate):
            return emulation.attended(inputs, **_options(candidate))
        delta = tensors["share"].tolist()
        return emulation.attended_as_decoded(inputs, **_options(candidate), delta=delta)

    def is_mask(self, candidate: Candidate) -> bool:
        return not _is_corrected(candidate)

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        window, sink = _choice(candidate)
        visible = mass.seen(inputs, rows, [window], [sink], _dilation(candidate))
        return mass.kept(inputs, rows, visible)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, info = match.site, calls.attention_info(match)
        options = {
            name: calls.with_value(site, editor, name, value, info.num_kv_heads)
            for name, (value,) in _options(candidate).items()
        }
        editor.update(site, **options)
        if _is_corrected(candidate):
            corrected.apply(site, info, tensors["share"], editor)


def _is_corrected(candidate: Candidate) -> bool:
    return "prompt_window" in candidate.parameters


def _choice(candidate: Candidate) -> tuple[int, int]:
    name = "prompt_window" if _is_corrected(candidate) else "window"
    return int(candidate.parameters[name]), int(candidate.parameters["sink"])


def _dilation(candidate: Candidate) -> int:
    return int(candidate.parameters.get("dilation", 1))


def _options(candidate: Candidate) -> dict[str, list[int]]:
    window, sink = _choice(candidate)
    dilated = {"dilation": [_dilation(candidate)]} if _dilation(candidate) > 1 else {}
    return {"window": [window], "sink_tokens": [sink], **dilated}


def _longest(scenarios: Sequence[Scenario]) -> int:
    return max((scenario.length for scenario in scenarios), default=0)
