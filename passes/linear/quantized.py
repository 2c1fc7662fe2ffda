"""Linear layer -> int8, int4 or fp8 weights, rounded with the gram of the inputs.

    y = linear(x, weight, bias)
    y = fxopt.quantized_linear(x, packed, scale, zero, bias, bits=4, group_size=64)
    y = fxopt.fp8_linear(x, weight, scale, bias)

Integers pay where the weight's bytes bound the call, that is in decoding, and always in weight
bytes; fp8 pays in prefill too, on tensor cores that have it, since it rounds x as well.
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
from fxopt.passes.linear import dense, formats
from fxopt.passes.linear.formats import Float8, Format


@dataclass(frozen=True)
class Quantized:
    """`group_sizes` are offered for 4 bits where they divide the input features; 8 bits take the
    largest of them that does, or else one scale a row. `fp8` offers rows of e4m3."""

    bits: tuple[int, ...] = (8, 4)
    group_sizes: tuple[int, ...] = (64, 128)
    fp8: bool = True

    name: ClassVar[str] = "linear.quantized"
    family: ClassVar[Family] = "linear"
    workloads: ClassVar[frozenset[str]] = dense.WORKLOADS
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    rounds: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def match(self, site: Site) -> Match | Refusal:
        if reason := dense.refusal(site):
            return reason
        match = Match(site)
        if not self._formats(dense.linear_info(match).in_features):
            return Refusal(
                f"no group size of {self.group_sizes} divides the "
                f"{dense.linear_info(match).in_features} input features"
            )
        return match

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        stored = self._formats(dense.linear_info(match).in_features)
        return [Candidate(self.name, f.label, f.parameters) for f in stored]

    def _formats(self, in_features: int) -> list[Format]:
        found: list[Format] = [*formats.integers(self.bits, self.group_sizes, in_features)]
        return [*found, Float8()] if self.fp8 else found

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        info = dense.linear_info(match)
        return f"no format of {self.bits} bits divides {info.in_features} input features"

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        return [formats.of(candidate.parameters).cost(dense.linear_info(match), scenario)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        weight = dense.weight_of(statistics)
        tensors = formats.of(candidate.parameters).fit(weight, formats.rounding_of(statistics))
        return dense.with_bias(tensors, statistics)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        stored = formats.of(candidate.parameters)
        return stored.run(inputs["x"], tensors, tensors.get("bias"))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        x, bias = dense.rows_and_bias(editor, match.site)
        stored = formats.of(candidate.parameters)
        y = formats.insert(editor, match.site, stored, x, tensors, bias)
        dense.replace_by_rows(editor, match.site, y)
