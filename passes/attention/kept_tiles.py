"""What rewrites share under which a head visits, in prompts, some of the key tiles before a query.

    attend(q, k, v, mask, causal=True, top=(100, 0))    # KV head 0 only, a tenth of its tiles

They differ in how the tiles are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.site import Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.block_topk.reference import LEAST, SPARED, TILE, hides, tiles
from fxopt.passes.attention import calls, mass

Choose = Callable[..., Tensor]
"""Arguments and result of `kernels.hip.reference.chosen_tiles`."""


@dataclass(frozen=True)
class KeptTiles:
    """`shares` are per mille of the key tiles before a query; one is offered where the workload's
    longest prompt computes at most `most` of its pairs under it, and fewer than under the next
    larger share."""

    shares: tuple[int, ...] = (50, 100, 200)
    most: float = 0.6

    family: ClassVar[Family] = "attention"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward", "generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
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

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self.fitting(scenarios):
            return None
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            queries = max((scenario.queries for scenario in scenarios), default=0)
            return (
                f"no call of the workload brings more than {queries} tokens, and the last "
                f"{SPARED * TILE} of a call see all keys"
            )
        least, left = min(self.shares), part_of_pairs(prompt, min(self.shares))
        return (
            f"the longest prompt has {prompt.queries} tokens: with {least / 10:g}% of its tiles, "
            f"but at least {LEAST} of {TILE} keys, {left:.0%} of the attention would still be "
            f"computed, and it pays below {self.most:.0%}"
        )

    def fitting(self, scenarios: Sequence[Scenario], most: float | None = None) -> list[int]:
        """The shares under which at most `most` of the longest prompt's pairs are computed."""
        most = self.most if most is None else most
        prompt = calls.longest_prompt(scenarios)
        if prompt is None:
            return []
        # Where LEAST tiles are more than any share, all shares are one candidate.
        by_density = {part_of_pairs(prompt, share): share for share in sorted(self.shares)}
        return sorted(share for density, share in by_density.items() if density <= most)


def share_of(candidate: Candidate) -> int:
    """Per mille of the tiles that are kept."""
    return int(candidate.parameters["top"])


def mass_of(candidate: Candidate) -> int:
    """Per mille of the attention that is to be kept, 0 where a share of the tiles is."""
    return int(candidate.parameters.get("mass", 0))


def kept_mass(
    candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor, choose: Choose
) -> Tensor:
    """`Masking.kept_mass` of tiles that `choose` finds."""
    return mass.kept(inputs, rows, _visible(candidate, inputs, rows, choose))


def tiles_of(
    candidate: Candidate, inputs: Mapping[str, Any], number: int, choose: Choose
) -> Tensor:
    """The key tiles that a tile of the prompt's queries keeps, bool [B, KV, H / KV, 1, tiles]."""
    q, k, mask = inputs["q"], inputs["k"], inputs.get("mask")
    start, end = number * TILE, (number + 1) * TILE + k.shape[2] - q.shape[2]
    return choose(
        q[:, :, start : start + TILE], k[:, :, :end], None if mask is None else mask[:, :end],
        inputs["scale"], inputs.get("softcap", 0.0), [share_of(candidate)] * k.shape[1], spared=0,
    )  # fmt: skip


def set_option(match: Match, name: str, value: int, editor: Editor) -> None:
    """Give a site's head `value` as the option `name` of its op."""
    count = calls.attention_info(match).num_kv_heads
    found = calls.with_value(match.site, editor, name, value, count)
    editor.update(match.site, **{name: found})


def _visible(
    candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor, choose: Choose
) -> Tensor:
    """The keys of the tiles that each of the queries `rows` [R] keeps: bool [B, H, R, T].

    Only tiles of queries that have one of them are estimated.
    """
    q, k = inputs["q"], inputs["k"]
    (batch, heads, queries), keys = q.shape[:3], k.shape[2]
    prompt = inputs.get("prompt") or queries
    past = keys - queries
    visible = torch.ones(batch, heads, len(rows), keys, dtype=torch.bool, device=q.device)
    if not hides(prompt, prompt + past, mass_of(candidate)):
        return visible
    for number in (rows // TILE).unique().tolist():
        if number >= tiles(prompt) - SPARED:
            continue
        end = (number + 1) * TILE + past
        chosen = tiles_of(candidate, inputs, number, choose)
        kept = chosen.flatten(1, 3).repeat_interleave(TILE, 2)[:, :, :end]
        visible[:, :, rows // TILE == number, :end] = kept[:, :, None]
    return visible


def part_of_pairs(prompt: Scenario, share: int, mass: int = 0) -> float:
    """What of the pairs of causal attention is computed, at most."""
    every = calls.visible_pairs(prompt.queries, prompt.length, True, 0, 0)
    return calls.kept_pairs(prompt.queries, prompt.length, share, mass) / every
