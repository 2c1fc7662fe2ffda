"""Linear layer -> a grid of b x b blocks of rank k, as two block-diagonal products.

    y = linear(x, weight, bias)
    y = fxopt.monarch_linear(x, right, left, bias)

Holds the parameters of a low-rank layer of rank b * k, but may have full rank: for weights whose
blocks are low-rank each in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import Family, Site, rows_of
from fxopt.ir.workload import Scenario
from fxopt.kernels.monarch_linear import REFERENCE, monarch_linear
from fxopt.passes.linear import dense, projection


@dataclass(frozen=True)
class Monarch:
    """`blocks` a side, where they divide both; `fractions` of the weight's parameters."""

    blocks: tuple[int, ...] = (2, 4)
    fractions: tuple[float, ...] = (0.25, 0.5)
    sweeps: int = 3

    name: ClassVar[str] = "linear.monarch"
    family: ClassVar[Family] = "linear"
    workloads: ClassVar[frozenset[str]] = dense.WORKLOADS
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2204.00595"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def match(self, site: Site) -> Match | Refusal:
        if reason := dense.refusal(site):
            return reason
        match = Match(site)
        if not self._sizes(match):
            info = dense.linear_info(match)
            return Refusal(
                f"{info.out_features} x {info.in_features} does not split into {self.blocks} "
                "equal blocks a side that low rank would shrink"
            )
        return match

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [
            Candidate(self.name, f"b{blocks}k{rank}", {"blocks": blocks, "rank": rank})
            for blocks, rank in self._sizes(match)
        ]

    def _sizes(self, match: Match) -> list[tuple[int, int]]:
        info, sizes = dense.linear_info(match), list[tuple[int, int]]()
        for blocks in self.blocks:
            if info.in_features % blocks or info.out_features % blocks:
                continue
            width = min(info.in_features, info.out_features) // blocks
            ranks = dense.ladder(info, self.fractions, at_most=width, parts=blocks)
            sizes += [(blocks, rank) for rank in ranks]
        return sizes

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        info = dense.linear_info(match)
        return (
            f"{info.out_features} x {info.in_features} is not divisible into {self.blocks} blocks"
        )

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        info, (blocks, rank) = dense.linear_info(match), _size(candidate)
        inner, rows = blocks * rank, rows_of(info, scenario)
        elements = inner * (info.in_features + info.out_features)

        def make(random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
            return monarch_linear, (
                random(blocks, inner, info.in_features // blocks),
                random(blocks, info.out_features // blocks, inner),
            )

        hidden = rows * blocks * inner
        return [
            dense.linear_call(
                "fxopt::monarch_linear",
                f"b{blocks}k{rank}",
                info,
                scenario,
                weight_bytes=elements * info.dtype.itemsize,
                flops=2.0 * rows * elements,
                hidden_elements=hidden,
                temporary_bytes=hidden * info.dtype.itemsize,
                launches=2,
                make=make,
            )
        ]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weight = dense.weight_of(statistics)
        blocks, rank = _size(candidate)
        right, left = projection.monarch(weight, statistics.gram, blocks, rank, self.sweeps)
        tensors = {
            "right": right.to(weight.dtype).contiguous(),
            "left": left.to(weight.dtype).contiguous(),
        }
        return dense.with_bias(tensors, statistics)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        return REFERENCE(inputs["x"], tensors["right"], tensors["left"], tensors.get("bias"))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site = match.site
        x, bias = dense.rows_and_bias(editor, site)
        right, left = (editor.tensor(site, name, tensors[name]) for name in ("right", "left"))
        target = torch.ops.fxopt.monarch_linear.default
        y = editor.call(site, target, (x, right, left, bias), {})
        dense.replace_by_rows(editor, site, y)


def _size(candidate: Candidate) -> tuple[int, int]:
    return int(candidate.parameters["blocks"]), int(candidate.parameters["rank"])
