"""An activation function's saved input -> in which piece of its derivative each value lies.

    h = gelu(x);  saved: x                          backward: dx = gelu_backward(dh, x)
    h = gelu(x);  saved: codes of x, 2 to 4 bits    backward: dx = dh * level[code]

The forward stays exact. The levels are the best piecewise constant derivative (`pieces.py`), so a
gradient that passes through is off by 4 % (4 bits) to 13 % (2 bits) of itself, one value as much
up as the next down; the budget needs a row for it (`relative_error`, measured against eager's
gradients). Pays where nothing else reads x: a code is an eighth to a quarter of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.site import Derivative, Family, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.activation import codes
from fxopt.passes.activation.pieces import Array, Pieces, fit
from fxopt.passes.activation.unchanged import Unchanged

POINTS = 1024
RANGES = {"tanh_backward": (-1.0, 1.0), "sigmoid_backward": (0.0, 1.0)}
"""Of functions whose derivative is one of their result: where results lie."""
WIDE = (-10.0, 10.0)
SMOOTH = (
    "gelu_backward", "silu_backward", "mish_backward", "softplus_backward", "hardswish_backward",
    "elu_backward", *RANGES,
)  # fmt: skip


@dataclass(frozen=True)
class ApproximateBackward(Unchanged):
    """`bits` are what is offered, the most first."""

    bits: tuple[int, ...] = (4, 3, 2)

    name: ClassVar[str] = "activation.approximate_backward"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.00441"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        found = codes.derivative(site)
        if isinstance(found, Refusal):
            return found
        if found.op not in SMOOTH:
            return Refusal(f"{found.op} has few values: activation.packed_mask keeps them exactly")
        if found.op == "elu_backward" and found.arguments[-1]:
            return Refusal("the derivative of an ELU in place is one of its result")
        return Match(site, {"derivative": found})

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [
            Candidate(self.name, f"{bits}-bit", {"bits": bits})
            for bits in self.bits
            if codes.smaller(match, bits)
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        return codes.too_small(match, min(self.bits))

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Making the codes, and the product that reads them."""
        return codes.calls(match, _pieces(match, candidate))

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; where codes are made follows from the whole plan."""
        codes.mark(match, _pieces(match, candidate), editor)


def _pieces(match: Match, candidate: Candidate) -> Pieces:
    found: Derivative = match.extra["derivative"]
    return derivative_pieces(
        found.op, found.place, found.arguments, found.keywords, int(candidate.parameters["bits"])
    )


@lru_cache
def derivative_pieces(
    op: str,
    place: int,
    arguments: tuple[Any, ...],
    keywords: tuple[tuple[str, Any], ...],
    bits: int,
) -> Pieces:
    """The best pieces for what an op of aten multiplies gradients with.

    Inputs count as 1 / (1 + x^2): whatever their spread, pieces are narrow where most of them lie
    and the tails still have some. Results count alike.
    """

    def function(x: Array) -> Array:
        value = torch.from_numpy(x)
        given = list(arguments)
        given.insert(place - 1, value)
        call = getattr(torch.ops.aten, op)
        return call(torch.ones_like(value), *given, **dict(keywords)).numpy()

    points = np.linspace(*RANGES.get(op, WIDE), POINTS)
    weights = np.ones(POINTS) if op in RANGES else 1 / (1 + points**2)
    return fit(function, points, weights, 2**bits)
