"""A saved tensor of which the backward needs which side of a border -> one bit a value.

    h = relu(x);  saved: h             backward: dx = threshold_backward(dh, h)
    h = relu(x);  saved: bits of h     backward: dx = dh * level[bit]

Exact. Serves ReLU and its like where no other op reads the tensor (dropout or a sum follows, say),
masks of dropout, which take a byte on CUDA, and its noise on a CPU, which takes four. Two borders,
as those of ReLU6, take two bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.site import Derivative, Family, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.activation import codes
from fxopt.passes.activation.pieces import Pieces
from fxopt.passes.activation.unchanged import Unchanged


@dataclass(frozen=True)
class PackedMask(Unchanged):
    """Has no options."""

    name: ClassVar[str] = "activation.packed_mask"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.00441"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        found = codes.derivative(site)
        if isinstance(found, Refusal):
            return found
        pieces = exact_pieces(found)
        if pieces is None:
            return Refusal(f"{found.op} has more than a few values")
        return Match(site, {"derivative": found, "pieces": pieces})

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        bits = match.extra["pieces"].bits
        if not codes.smaller(match, bits):
            return []
        return [Candidate(self.name, f"{bits}-bit", {"bits": bits})]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        return codes.too_small(match, match.extra["pieces"].bits)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Making the codes, and the product that reads them."""
        return codes.calls(match, match.extra["pieces"])

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; where codes are made follows from the whole plan."""
        codes.mark(match, match.extra["pieces"], editor)


def exact_pieces(found: Derivative) -> Pieces | None:
    """The values that an op multiplies gradients with and where they change, if they are few."""
    given = found.arguments
    if found.op == "threshold_backward" and given == (0,):
        return Pieces((0.0,), (0.0, 1.0))
    if found.op == "leaky_relu_backward" and given[0] >= 0:
        return Pieces((0.0,), (float(given[0]), 1.0))
    if found.op == "hardtanh_backward" and _exact(given, found.dtype) and given[0] < given[1]:
        return Pieces((float(given[0]), _below(given[1], found.dtype)), (0.0, 1.0, 0.0))
    if found.op == "native_dropout_backward":
        return Pieces((0.5,), (0.0, float(given[0])))
    if found.op == "dropout_noise" and given[0] < 1:
        # as the noise is made, rounding included
        return Pieces((0.5,), (0.0, torch.ones((), dtype=found.dtype).div(1 - given[0]).item()))
    return None


def _exact(values: Sequence[float], dtype: torch.dtype) -> bool:
    return all(torch.tensor(v, dtype=dtype).item() == v for v in values)


def _below(value: float, dtype: torch.dtype) -> float:
    """The number before `value` of those that values are compared in."""
    wide = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(wide(value), wide(-np.inf)))
