"""Linear layer -> two thin ones, the best of their rank for the inputs seen in calibration.

    y = linear(x, weight, bias)
    y = fxopt.low_rank_linear(x, down, up, bias)        # linear(linear(x, down), up, bias)

Pays in every regime, in proportion to rank * (in + out) / (in * out), where the layer's output
does lie near a subspace: query and key projections more often than feed-forward ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, SiteStatistics
from fxopt.ir.site import LinearInfo, rows_of
from fxopt.ir.workload import Scenario
from fxopt.kernels.low_rank_linear import REFERENCE, low_rank_linear
from fxopt.passes.linear import dense


@dataclass(frozen=True)
class LowRank(dense.Structure):
    """`fractions` of the rank at which the factors hold as many parameters as the weight."""

    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)

    name: ClassVar[str] = "linear.low_rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07378"

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = dense.linear_info(match)
        ranks = dense.ladder(info, self.fractions, at_most=min(info.in_features, info.out_features))
        return [Candidate(self.name, f"rank{rank}", {"rank": rank}) for rank in ranks]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        return [low_rank_call(dense.linear_info(match), _rank(candidate), scenario)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weight = dense.weight_of(statistics)
        down, up = dense.low_rank(statistics, _rank(candidate))
        tensors = {"down": down.to(weight.dtype), "up": up.to(weight.dtype).contiguous()}
        return dense.with_bias(tensors, statistics)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        return REFERENCE(inputs["x"], tensors["down"], tensors["up"], tensors.get("bias"))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, info = match.site, dense.linear_info(match)
        x, bias = dense.input_and_bias(editor.node(site))
        factors = _kernels(tensors["down"], tensors["up"], info)
        down, up = (editor.tensor(site, n, f) for n, f in zip(("down", "up"), factors, strict=True))
        if info.patch:
            target = dense.convolution(info.patch)
            hidden = editor.call(site, target, (x, down, None, list(info.patch)), {})
            editor.replace(site, editor.call(site, target, (hidden, up, bias), {}))
            return
        target = torch.ops.fxopt.low_rank_linear.default
        editor.replace(site, editor.call(site, target, (x, down, up, bias), {}))


def low_rank_call(info: LinearInfo, rank: int, scenario: Scenario) -> OpCall:
    """The op call of two factors in place of the layer."""
    rows, elements = rows_of(info, scenario), rank * (info.in_features + info.out_features)

    def make(random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        factors = random(rank, info.in_features), random(info.out_features, rank)
        if info.patch:
            return _convolved, (*_kernels(*factors, info), info.patch)
        return low_rank_linear, factors

    return dense.linear_call(
        "fxopt::low_rank_convolution" if info.patch else "fxopt::low_rank_linear",
        f"r{rank}",
        info,
        scenario,
        weight_bytes=elements * info.dtype.itemsize,
        flops=2.0 * rows * elements,
        hidden_elements=rows * rank,
        temporary_bytes=rows * rank * info.dtype.itemsize,
        launches=2,
        convolves=bool(info.patch),
        make=make,
    )


def _kernels(down: Tensor, up: Tensor, info: LinearInfo) -> tuple[Tensor, Tensor]:
    """The factors as two convolutions, the second over single positions; as they are otherwise."""
    if not info.patch:
        return down, up
    return dense.kernel(down, info), up.reshape(*up.shape, *(1 for _ in info.patch))


def _convolved(
    x: Tensor, down: Tensor, up: Tensor, patch: Sequence[int], *, bias: Tensor | None
) -> Tensor:
    hidden = dense.convolve(x, down, patch, bias=None)
    return dense.convolve(hidden, up, [1] * len(patch), bias=bias)


def _rank(candidate: Candidate) -> int:
    return int(candidate.parameters["rank"])
