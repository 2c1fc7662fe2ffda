"""Linear layer -> two thin ones on integer weights, the second fitted to what the first became.

    y = linear(x, weight, bias)
    z = fxopt.quantized_linear(x, down_packed, down_scale, down_zero, None, bits, in)
    y = fxopt.quantized_linear(z, up_packed, up_scale, up_zero, bias, bits, rank)

Pays where low rank does and a byte counts twice: the fewest bytes of all at a given rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, SiteStatistics
from fxopt.ir.workload import Scenario
from fxopt.passes.linear import dense, formats, projection
from fxopt.passes.linear.formats import Integer
from fxopt.passes.linear.rounding import Rounding

LARGEST_GROUP = 128


@dataclass(frozen=True)
class LowRankQuantized(dense.Structure):
    """`fractions` of the rank at which unquantized factors hold as many parameters as the weight;
    8 bits have one scale a row, 4 bits one for at most 128 columns."""

    bits: tuple[int, ...] = (8, 4)
    fractions: tuple[float, ...] = (0.5, 0.75)

    name: ClassVar[str] = "linear.low_rank_quantized"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.18886"

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = dense.linear_info(match)
        ranks = dense.ladder(info, self.fractions, at_most=min(info.in_features, info.out_features))
        return [
            Candidate(self.name, f"rank{rank}-int{bits}", {"rank": rank, "bits": bits})
            for bits in self.bits
            for rank in ranks
            if bits == 8 or info.in_features % 2 == 0
        ]

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        info, rank = dense.linear_info(match), _rank(candidate)
        down, up = _formats(candidate, info.in_features)
        first = replace(info, out_features=rank, bias=None)
        second = replace(info, in_features=rank, patch=())
        return [down.cost(first, scenario), up.cost(second, scenario)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weight, gram = dense.weight_of(statistics), statistics.gram
        down, up = _formats(candidate, weight.shape[1])
        factor, _ = dense.low_rank(statistics, _rank(candidate))
        first = down.fit(factor.to(weight.dtype), formats.rounding_of(statistics))
        fitted, inner = projection.output_factor(weight, gram, down.restored(first))
        second = up.fit(fitted.to(weight.dtype), Rounding.of(inner))
        tensors = {**formats.prefixed("down_", first), **formats.prefixed("up_", second)}
        return dense.with_bias(tensors, statistics)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        x: Tensor = inputs["x"]
        down, up = _formats(candidate, x.shape[-1])
        hidden = down.run(x, formats.part("down_", tensors), None)
        return up.run(hidden, formats.part("up_", tensors), tensors.get("bias"))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site = match.site
        x, bias = dense.rows_and_bias(editor, site)
        down, up = _formats(candidate, dense.linear_info(match).in_features)
        hidden = formats.insert(editor, site, down, x, tensors, None, "down_")
        y = formats.insert(editor, site, up, hidden, tensors, bias, "up_")
        dense.replace_by_rows(editor, site, y)


def _rank(candidate: Candidate) -> int:
    return int(candidate.parameters["rank"])


def _formats(candidate: Candidate, in_features: int) -> tuple[Integer, Integer]:
    """Those of the two factors."""
    bits = int(candidate.parameters["bits"])
    groups = [width if bits == 8 else _group(width) for width in (in_features, _rank(candidate))]
    return Integer(bits, groups[0]), Integer(bits, groups[1])


def _group(width: int) -> int:
    """The largest even divisor of `width` up to `LARGEST_GROUP`."""
    return max(g for g in range(2, min(width, LARGEST_GROUP) + 1, 2) if width % g == 0)
