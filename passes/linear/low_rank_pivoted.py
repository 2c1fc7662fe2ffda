"""Linear layer -> some of its rows, and the others as combinations of those.

    y = linear(x, weight, bias)
    z = linear(x, pivots)                                # [..., rank]
    y = index_select(cat(z, linear(z, others)), order) + bias

The same matrix as two factors of that rank in rank * (in + out) - rank² numbers instead of
rank * (in + out): at any rank below the smaller side fewer than the weight has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, SiteStatistics
from fxopt.ir.site import LinearInfo, rows_of
from fxopt.ir.workload import Scenario
from fxopt.passes.linear import dense, projection

aten = torch.ops.aten


@dataclass(frozen=True)
class LowRankPivoted(dense.Structure):
    """`fractions` of the weight's parameters."""

    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)

    name: ClassVar[str] = "linear.low_rank_pivoted"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.19090"

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = dense.linear_info(match)
        step = dense.rank_step(info)
        ranks = {max(step, step * round(_rank_of(info, f) / step)) for f in self.fractions}
        return [
            Candidate(self.name, f"rank{rank}", {"rank": rank})
            for rank in sorted(ranks)
            if rank < min(info.in_features, info.out_features)
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        info, rank = dense.linear_info(match), _rank(candidate)
        rows, rest = rows_of(info, scenario), info.out_features - rank
        elements = rank * (info.in_features + rest)
        size = info.dtype.itemsize

        def make(random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
            pivots, others = random(rank, info.in_features), random(rest, rank)
            order = torch.randperm(info.out_features, device=pivots.device)
            return _pivoted, (pivots, others, order.int())

        return [
            dense.linear_call(
                "fxopt::low_rank_pivoted",
                f"r{rank}",
                info,
                scenario,
                weight_bytes=elements * size + 4 * info.out_features,
                flops=2.0 * rows * elements,
                # z, then the rows joined, before they are put in order
                hidden_elements=rows * (rank + info.out_features),
                temporary_bytes=rows * (rank + info.out_features) * size,
                launches=5 if info.bias else 4,
                make=make,
            )
        ]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weight = dense.weight_of(statistics)
        pivots, others, order = projection.pivoted(*dense.low_rank(statistics, _rank(candidate)))
        tensors = {
            "pivots": pivots.to(weight.dtype).contiguous(),
            "others": others.to(weight.dtype).contiguous(),
            "order": order.int(),
        }
        return dense.with_bias(tensors, statistics)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        weight = (tensors[name] for name in ("pivots", "others", "order"))
        return _pivoted(inputs["x"], *weight, bias=tensors.get("bias"))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site = match.site
        x, bias = dense.rows_and_bias(editor, site)
        names = ("pivots", "others", "order")
        pivots, others, order = (editor.tensor(site, name, tensors[name]) for name in names)
        first = dense.call(editor, site, x, pivots, None)
        second = dense.call(editor, site, first, others, None)
        joined = editor.call(site, aten.cat.default, ([first, second], -1), {})
        y = editor.call(site, aten.index_select.default, (joined, -1, order), {})
        if bias is not None:
            y = editor.call(site, aten.add.Tensor, (y, bias), {})
        dense.replace_by_rows(editor, site, y)


def _pivoted(
    x: Tensor, pivots: Tensor, others: Tensor, order: Tensor, *, bias: Tensor | None
) -> Tensor:
    first = F.linear(x, pivots)
    y = torch.cat([first, F.linear(first, others)], -1).index_select(-1, order)
    return y if bias is None else y + bias


def _rank_of(info: LinearInfo, fraction: float) -> float:
    """The rank at which rank * (in + out) - rank² is `fraction` of in * out."""
    sides = info.in_features + info.out_features
    return (sides - math.sqrt(sides**2 - 4 * fraction * info.in_features * info.out_features)) / 2


def _rank(candidate: Candidate) -> int:
    return int(candidate.parameters["rank"])
