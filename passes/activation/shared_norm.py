"""The input of a norm, saved for its backward -> made again from the norm's output.

    y = layer_norm(x, w, b);  z = linear(y)
    saved: x, y                   backward: reads y, then x
    saved: y                      backward: reads y, then x' = ((y - b) / w) / rstd + mean

The linear layer saves y anyway, and norm and layer share it: nothing waits for x. Where y waits as
codes (`quantized_saved`) x' is what these stand for. An output in 16 bits, of an input in 32 under
autocast, or in codes, is rounded, so x' is not x, and the budget needs a row for it
(`relative_error`, measured against eager's gradients). Exact plans free as much by running the norm
again from x, which a rounded x does not allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.saved import MARK, Image
from fxopt.ir.site import Family, NormInfo, SavedInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.norm_input import norm_input, workspace
from fxopt.passes.activation.quantized_saved import PEAK
from fxopt.passes.activation.unchanged import Unchanged

NEARER = 4.0
"""A weight may become so many times smaller than `spread` lets it be now before its values are 0:
division raises the rounding further then, but no gradient is lost while weights shrink."""


@dataclass(frozen=True)
class SharedNorm(Unchanged):
    """`spread` is how many times the largest output may be the least weight: by so much division
    raises the rounding of codes at the most."""

    spread: float = 64.0

    name: ClassVar[str] = "activation.shared_norm"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.16282"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, SavedInfo):
            return Refusal("not a tensor that is saved for the backward")
        norm = site.info.norm
        if norm is None:
            return Refusal("not the input of a norm whose output the next layer saves")
        if not site.info.whole:
            return Refusal("its memory is more than the tensor, and the rest may be read as well")
        if not norm.least * self.spread >= norm.most > 0:
            return Refusal(
                f"the norm's output is divided by a weight of {norm.least:.2g}, where weight and "
                f"bias reach {norm.most:.2g}: more than {self.spread:g} times as much"
            )
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [Candidate(self.name, "shared", {})]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """None: whatever matches can be made again."""
        return None

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Making it again."""
        info, norm = _info(match)
        count, width = math.prod(info.shape), info.shape[-1]
        given = (norm.weight, norm.bias, norm.rstd, norm.mean)

        def call(device: Any) -> Callable[[], Any]:
            y = torch.ones(info.shape, dtype=norm.dtype, device=device)
            vectors = [torch.ones(width, device=device) if g else None for g in given[:2]]
            rows = [
                torch.ones(*info.shape[:-1], 1, device=device) if g else None for g in given[2:]
            ]
            return lambda: norm_input(y, *vectors, *rows, 0.0, info.shape, info.dtype)

        return [
            OpCall(
                "fxopt::norm_input",
                f"norm_input/{''.join('01'[g] for g in given)}"
                f"/{str(norm.dtype).removeprefix('torch.')}"
                f"/{str(info.dtype).removeprefix('torch.')}{list(info.shape)}",
                0.0,
                count * norm.dtype.itemsize,
                info.bytes,
                temporary_bytes=workspace(count, info.dtype) if info.device == "cpu" else 0,
                run=call,
            )
        ]

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; what it is made of is known of the step."""
        info, norm = _info(match)
        editor.node(match.site).meta[MARK] = Image(
            unpack=norm_input,
            unpack_arguments=(norm.most / self.spread / NEARER, info.shape, info.dtype),
            # as of int8 codes, which the output may wait in
            rounding=PEAK / 127 / math.sqrt(12),
            shares=True,
        )


def _info(match: Match) -> tuple[SavedInfo, NormInfo]:
    info = match.site.info
    assert isinstance(info, SavedInfo)
    assert info.norm is not None
    return info, info.norm
