"""KV cache -> blocks of 4 or 2-bit integers of keys whose channels were mixed before.

    out = attend(q, k, v, mask, state=state, start=start, ...)
    q = mix_channels(q, query_rotation)
    k = mix_channels(k, key_rotation)
    out = attend(q, k, v, mask, state=state, start=start, ..., layout="k2v2g64r64s4")

The matrices of a KV head are the inverse transposes of each other, so that no score changes. That
of the keys is a randomised Hadamard matrix (QuaRot) over channels that were balanced against those
of the queries (SmoothQuant, arXiv 2211.10438), both made of powers of two and their signs: exact
in every dtype. Behind them all channels of a key have about one range and weigh about the same in a
score, where before a channel of wide range that queries hardly look at takes as many bits as any.
Rotary embeddings stand between the projections and here, so that the products are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.ops import mix_channels
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.kv_attention.layout import Blocks as Format
from fxopt.kernels.kv_attention.packing import Bits
from fxopt.passes.kv_cache import calls
from fxopt.passes.kv_cache.blocks import Blocks

_LAG = 32
"""Tokens apart whose keys differ as those of a block do."""
_CONSTANT = 1e-3
"""What a constant costs beside what varies as much: zeros and mixed channels are rounded."""
_FLOOR = 1e-6
"""The least share of the mean that a channel counts as."""


@dataclass(frozen=True)
class Rotated(Blocks):
    """Options as of `Blocks`; at 8 bits rounding keys is hardly an error that could shrink."""

    bits: tuple[tuple[Bits, Bits], ...] = ((4, 4), (4, 2), (2, 2))

    name: ClassVar[str] = "kv_cache.rotated"
    rounds: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.00456"

    def match(self, site: Site) -> Match | Refusal:
        found = super().match(site)
        if isinstance(found, Refusal):
            return found
        size = calls.attention_info(found).head_dim
        if size & (size - 1):
            return Refusal(f"a Hadamard matrix is made for a power of two channels, not {size}")
        return found

    def _candidate(self, fmt: Format) -> Candidate:
        plain = super()._candidate(fmt)
        return Candidate(self.name, f"{plain.label}h", plain.parameters)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The calls of packed keys, and the products with the new queries and keys."""
        rotation = calls.rotation_call(calls.attention_info(match), scenario)
        return [*super().lower(match, candidate, scenario), rotation]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        """`scale` [KV, D]: what each channel of a key is multiplied by before they are mixed, a
        signed power of two; of all heads, since one emulation serves them all."""
        return {"scale": statistics.once("scale", lambda: channel_scale(statistics.inputs))}

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        query, key = rotations(tensors["scale"], inputs["k"].dtype)
        mixed = {"q": mix_channels(inputs["q"], query), "k": mix_channels(inputs["k"], key)}
        return super().emulate(match, candidate, {}, {**inputs, **mixed})

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """The heads of a layer that are rotated share both products."""
        super().apply(match, candidate, tensors, editor)
        site, info = match.site, calls.attention_info(match)
        query, key = rotations(tensors["scale"], info.dtype)
        _mix(site, editor, "q", "query_rotation", query)
        _mix(site, editor, "k", "key_rotation", key)


def _mix(site: Site, editor: Editor, argument: str, name: str, matrices: Tensor) -> None:
    """Let the attention of `site` read `argument` with the channels of this head mixed."""
    assert site.head is not None
    read: Any = editor.node(site).args["qk".index(argument)]
    mine, heads = matrices[site.head, None].clone(), [site.head]  # no view of all heads
    if read.target is mix_channels:
        (x, held), heads = read.args, sorted([*read.kwargs["heads"], site.head])
        place = heads.index(site.head)
        editor.amend(site, held, lambda kept: torch.cat([kept[:place], mine, kept[place:]]))
    else:
        x, held = read, editor.tensor(site, name, mine)
    some = {"heads": tuple(heads), "kv_heads": len(matrices)} if len(heads) < len(matrices) else {}
    mixed = editor.call(site, mix_channels, (x, held), some)
    editor.update(site, **{argument: mixed})


def channel_scale(inputs: Mapping[str, Any]) -> Tensor:
    """Signed powers of two, float32 [KV, D], for the channels of keys, from recorded q and k.

    With channels scaled by b and mixed, all have the mean square of b * k within a block as their
    range, and the error of a score is that times the mean square of q / b: least where b^4 is the
    ratio of both. What is constant within a block costs nothing but the precision of its zero.
    """
    k: Tensor = inputs["k"]
    mask: Tensor | None = inputs.get("mask")
    lag = min(_LAG, k.shape[2] // 2)
    later, earlier = slice(lag, None), slice(k.shape[2] - lag)
    apart = None if mask is None else mask[:, later] * mask[:, earlier]
    varying = _mean_square(k[:, :, later] - k[:, :, earlier], apart) / 2
    keys = varying + _CONSTANT * _mean_square(k, mask)
    queries = _mean_square(inputs["q"], None).unflatten(0, (k.shape[1], -1)).mean(1)
    queries, keys = (x + _FLOOR * x.mean(-1, keepdim=True) for x in (queries, keys))
    steps = torch.where((queries > 0) & (keys > 0), (queries / keys).log2() / 4, 0.0)
    steps = (steps - steps.mean(-1, keepdim=True)).round()
    signs = torch.randint(0, 2, steps.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.to(steps) * 2.0**steps


def _mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    """Of each head's channels, [H, D], over the tokens that `mask` [B, T] leaves."""
    squares = x.float().square()
    if mask is None:
        return squares.mean((0, 2))
    seen = (mask != 0).to(squares)[:, None, :, None]
    return (squares * seen).sum((0, 2)) / seen.sum().clamp(min=1)


def rotations(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrices [KV, D, D] of queries and keys, exact in every `dtype`: q @ M_q (k @ M_k)^T is
    q @ k^T. What both would be divided by, the square root of D, is shared out in powers of two."""
    mixing = hadamard(scale.shape[-1]).to(scale)
    size = len(mixing).bit_length() - 1
    shares = 2.0 ** (size // 2), 2.0 ** (size - size // 2)
    query, key = (
        (by[..., None] * mixing / share).to(dtype)
        for by, share in zip((1 / scale, scale), shares, strict=True)
    )
    return query, key


def hadamard(size: int) -> Tensor:
    """The matrix of ones and minus ones whose rows are orthogonal (Sylvester), size a power of
    two."""
    matrix, step = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix
