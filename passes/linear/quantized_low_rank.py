"""Linear layer -> int4 weights, and a low-rank layer beside them that makes up for the rounding.

    y = linear(x, weight, bias)
    y = fxopt.quantized_linear(x, packed, scale, zero, bias, 4, group_size)
        + fxopt.low_rank_linear(x, down, up, None)

Pays where int4 is a little too coarse: a few per cent more bytes for a smaller error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.low_rank_linear import REFERENCE
from fxopt.passes.linear import dense, formats, projection
from fxopt.passes.linear.formats import Integer
from fxopt.passes.linear.low_rank import low_rank_call


@dataclass(frozen=True)
class QuantizedLowRank(dense.Structure):
    """`ranks` of the layer beside groups of `group_size` columns; `rounds` of fitting one to what
    the other leaves."""

    ranks: tuple[int, ...] = (16, 32)
    group_size: int = 64
    rounds: int = 2

    name: ClassVar[str] = "linear.quantized_low_rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.08659"

    def match(self, site: Site) -> Match | Refusal:
        if reason := dense.refusal(site):
            return reason
        match = Match(site)
        if dense.linear_info(match).in_features % self.group_size:
            return Refusal(
                f"groups of {self.group_size} do not divide the "
                f"{dense.linear_info(match).in_features} input features"
            )
        return match

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = dense.linear_info(match)
        # beyond this, eight bits hold less
        most = info.in_features * info.out_features / (info.in_features + info.out_features) / 4
        return [
            Candidate(
                self.name,
                f"int4-g{self.group_size}+rank{rank}",
                {"rank": rank, "bits": 4, "group_size": self.group_size},
            )
            for rank in self.ranks
            if rank <= most
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        info, stored = dense.linear_info(match), _format(candidate)
        beside = low_rank_call(replace(info, bias=None, patch=()), _rank(candidate), scenario)
        add = dense.elementwise_call("aten::add", info, scenario, lambda y: y + y, reads=2)
        return [stored.cost(info, scenario), beside, add]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weight, gram = dense.weight_of(statistics), statistics.gram
        stored, rank = _format(candidate), _rank(candidate)
        # the largest directions first: what is left of them has a smaller range to round
        down, up = dense.low_rank(statistics, rank)
        inputs = formats.rounding_of(statistics)
        found: list[tuple[float, dict[str, Tensor]]] = []
        for _ in range(self.rounds):
            tensors = stored.fit((weight - up @ down).to(weight.dtype), inputs)
            rest = weight.double() - stored.restored(tensors).double()
            factors = [f.to(weight.dtype) for f in projection.low_rank(rest, gram, rank)]
            down, up = (factor.contiguous() for factor in factors)
            loss = float(projection.error(rest - up.double() @ down.double(), gram))
            found.append((loss, {**tensors, "down": down, "up": up}))
        _, tensors = min(found, key=lambda entry: entry[0])
        return dense.with_bias(tensors, statistics)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        main = _format(candidate).run(inputs["x"], tensors, tensors.get("bias"))
        return main + REFERENCE(inputs["x"], tensors["down"], tensors["up"], None)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site = match.site
        x, bias = dense.rows_and_bias(editor, site)
        down, up = (editor.tensor(site, name, tensors[name]) for name in ("down", "up"))
        target = torch.ops.fxopt.low_rank_linear.default
        # First, so that the integer product can add it when it stores its own.
        beside = editor.call(site, target, (x, down, up, None), {})
        main = formats.insert(editor, site, _format(candidate), x, tensors, bias)
        add = torch.ops.aten.add.Tensor
        y = editor.call(site, add, (main, beside), {})
        dense.replace_by_rows(editor, site, y)


def _rank(candidate: Candidate) -> int:
    return int(candidate.parameters["rank"])


def _format(candidate: Candidate) -> Integer:
    return Integer(int(candidate.parameters["bits"]), int(candidate.parameters["group_size"]))
