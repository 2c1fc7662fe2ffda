"""What recorded attention tells of masks: how much of a head they leave, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..ir.rewrite import Masking, Varying
from ..ir.site import AttentionInfo
from .propose import Proposal
from .statistics import Statistics

ROWS = 128
"""Queries whose scores are computed: the interval says what so few leave open."""
CONFIDENCE = 0.95


class Masses:
    """Kept mass of masks of attention; each is computed once for all heads of an op."""

    def __init__(self, statistics: Statistics, *, seed: int = 0) -> None:
        self._statistics, self._seed = statistics, seed
        self._kept: dict[tuple[str, str, str], Tensor] = {}

    def __call__(self, proposal: Proposal) -> tuple[float, float, float]:
        """Lower bound, mean and upper bound over queries, the query heads of a KV head alike."""
        site, info = proposal.site, proposal.site.info
        assert isinstance(info, AttentionInfo)
        group = info.num_heads // info.num_kv_heads
        first = 0 if site.head is None else site.head * group
        count = info.num_heads if site.head is None else group
        return interval(self._of_op(proposal)[:, first : first + count].double().mean((0, 1)))

    def _of_op(self, proposal: Proposal) -> Tensor:
        """[B, H, R]."""
        rewrite, node = proposal.rewrite, proposal.site.node
        assert isinstance(rewrite, Masking)
        key = (node, rewrite.name, proposal.candidate.label)
        if key not in self._kept:
            inputs = self._statistics.at(proposal.site).inputs
            rows = sampled(inputs, self._seed, rewrite.decoding)
            with torch.no_grad():
                found = rewrite.kept_mass(proposal.match, proposal.candidate, inputs, rows)
            self._kept[key] = found
        return self._kept[key]


class Densities:
    """The work that choices by the data do; each is computed once for all heads of an op."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._found: dict[tuple[str, str, str], Tensor] = {}

    def __call__(self, proposal: Proposal) -> float:
        """Of the site's KV head, or the mean of all where it has none."""
        rewrite, site = proposal.rewrite, proposal.site
        assert isinstance(rewrite, Varying)
        key = (site.node, rewrite.name, proposal.candidate.label)
        if key not in self._found:
            inputs = self._statistics.at(site).inputs
            with torch.no_grad():
                found = rewrite.density(proposal.match, proposal.candidate, inputs)
            self._found[key] = found.cpu()
        found = self._found[key]
        return float(found.mean() if site.head is None else found[site.head])


def sampled(inputs: Mapping[str, Any], seed: int, decoding: bool = False) -> Tensor:
    """Places of at most `ROWS` queries of an attention call, one drawn from each of as many
    stretches of equal length; padding, where the queries are the keys, is left out, and with
    `decoding` the prompt."""
    queries, mask = inputs["q"].shape[2], inputs.get("mask")
    places = torch.arange(queries)
    if mask is not None and mask.shape[1] == queries:
        places = (mask != 0).any(0).nonzero().flatten().cpu()
    if decoding:
        places = places[places >= inputs.get("prompt", 0)]
    count = min(ROWS, len(places))
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    picked = (torch.arange(count) + drawn) * len(places) / max(count, 1)
    return places[picked.long()].to(inputs["q"].device)


def interval(values: Tensor) -> tuple[float, float, float]:
    """The mean of a share over drawn queries, between its bounds by Student's t: wide enough,
    since queries drawn from stretches vary less in the mean than as many drawn from all."""
    count, mean = len(values), values.mean().item()
    t = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2)) if count > 1 else math.inf
    half = t * values.std().item() / math.sqrt(count) if count > 1 else math.inf
    return max(mean - half, 0.0), mean, min(mean + half, 1.0)
