"""A tensor saved for the backward -> integer codes with one scale a group, saved instead.

    h = gelu(x);  saved: h                       backward: reads h
    h = gelu(x);  saved: codes, top of h         backward: reads h' = unpack(codes, top)

The forward stays exact: codes are made after its last op that reads h, and only the backward sees
h'. Gradients are then off by about the rounding, which averages out in sums over tokens, so the
budget needs a row for it (`relative_error`, measured against eager's gradients). Pays where running
ops again would cost more than two passes over the tensor: products of matrices, attention.
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
from fxopt.ir.site import Family, SavedInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.pack_activation import pack_activation, packed_bytes, unpack_activation
from fxopt.passes.activation.unchanged import Unchanged

GROUP = 128
PEAK = 2.8
"""The largest of `GROUP` normal values, in standard deviations."""


@dataclass(frozen=True)
class QuantizedSaved(Unchanged):
    """`bits` are what is offered, the most first."""

    bits: tuple[int, ...] = (8, 4)

    name: ClassVar[str] = "activation.quantized_saved"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.11124"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        info = site.info
        if not isinstance(info, SavedInfo):
            return Refusal("not a tensor that is saved for the backward")
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            return Refusal(f"{info.dtype} holds indices, masks or codes, which do not round")
        if info.output:
            return Refusal("a statistic that its op returns besides; backwards divide by such")
        if not info.whole:
            return Refusal("its memory is more than the tensor, and the rest may be read as well")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = _info(match)
        return [
            Candidate(self.name, f"int{bits}", {"bits": bits, "group_size": GROUP})
            for bits in self.bits
            if _packed(info, bits) < info.bytes
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        info = _info(match)
        least = min(_packed(info, bits) for bits in self.bits)
        return f"{least} bytes of codes and scales are no less than the {info.bytes} of the tensor"

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Packing and unpacking."""
        info, (bits, group) = _info(match), _format(candidate)
        count, packed = math.prod(info.shape), packed_size(match, candidate)
        key = f"b{bits}g{group}/{str(info.dtype).removeprefix('torch.')}[{count}]"

        def pack(device: Any) -> Callable[[], Any]:
            x = torch.randn(count, device=device).to(info.dtype)
            return lambda: pack_activation(x, bits, group)

        def unpack(device: Any) -> Callable[[], Any]:
            codes, top = pack(device)()
            return lambda: unpack_activation(codes, top, (count,), (1,), bits, group)

        return [
            OpCall(
                "fxopt::pack_activation", f"pack_activation/{key}", 0.0, info.bytes, packed,
                run=pack,
            ),
            OpCall(
                "fxopt::unpack_activation", f"unpack_activation/{key}", 0.0, packed, info.bytes,
                run=unpack,
            ),
        ]  # fmt: skip

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; where codes are made and read follows from the whole plan."""
        info, (bits, group) = _info(match), _format(candidate)
        # uniform in a step, which the largest value of a group spans with all others
        rounding = PEAK / (2 ** (bits - 1) - 1) / math.sqrt(12)
        editor.node(match.site).meta[MARK] = Image(
            pack_activation,
            (bits, group),
            unpack_activation,
            (info.shape, info.stride, bits, group),
            rounding,
        )


def packed_size(match: Match, candidate: Candidate) -> int:
    """Bytes of the codes and scales of a candidate."""
    return _packed(_info(match), _format(candidate)[0])


def _info(match: Match) -> SavedInfo:
    assert isinstance(match.site.info, SavedInfo)
    return match.site.info


def _format(candidate: Candidate) -> tuple[int, int]:
    return int(candidate.parameters["bits"]), int(candidate.parameters["group_size"])


def _packed(info: SavedInfo, bits: int) -> int:
    return packed_bytes(math.prod(info.shape), info.dtype, bits, GROUP)
