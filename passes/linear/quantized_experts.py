"""Experts of a mixture, stacked in one weight -> int8 or int4 codes of all of them.

    y = grouped_mm(x, weight.transpose(-2, -1), offsets)       # rows of x sorted by expert
    y = fxopt.quantized_experts(x, packed, scale, zero, offsets, bits, group_size)

One decision for all experts of a projection. Pays in weight bytes, of which experts are nearly
all that such a model has, and where the bytes of the experts that are hit bound the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import ExpertsInfo, Family, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.quantized_experts import quantized_experts
from fxopt.kernels.quantized_linear import quantize
from fxopt.passes.linear import dense, formats
from fxopt.passes.linear.formats import Integer


@dataclass(frozen=True)
class QuantizedExperts:
    """`bits` and `group_sizes` as those of `linear.quantized`."""

    bits: tuple[int, ...] = (8, 4)
    group_sizes: tuple[int, ...] = (64, 128)

    name: ClassVar[str] = "linear.quantized_experts"
    family: ClassVar[Family] = "linear"
    groups: ClassVar[str] = "experts"
    workloads: ClassVar[frozenset[str]] = dense.WORKLOADS
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def match(self, site: Site) -> Match | Refusal:
        info = site.info
        if not isinstance(info, ExpertsInfo):
            return Refusal(f"{site.family} site: the rewrite serves experts of a mixture")
        if site.blocked is not None:
            return Refusal(site.blocked)
        if reason := dense.unfit(info):
            return reason
        if not formats.integers(self.bits, self.group_sizes, info.in_features):
            return Refusal(
                f"no group size of {self.group_sizes} divides the {info.in_features} input features"
            )
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        found = formats.integers(self.bits, self.group_sizes, _info(match).in_features)
        return [Candidate(self.name, f.label, f.parameters) for f in found]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """None: what matches has candidates."""
        return None

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        info, stored = _info(match), _format(candidate)
        bits, group, size = stored.bits, stored.group_size, info.dtype.itemsize
        elements = info.in_features * info.out_features

        def make(random: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            codes = _stacked(quantize(random(*_flat(info)), bits, group), info)

            def call(x: Tensor, offsets: Tensor) -> Tensor:
                return quantized_experts(x, *codes, offsets, bits, group)

            return call

        return [
            experts_call(
                "fxopt::quantized_experts",
                f"b{bits}g{group}",
                info,
                scenario,
                expert_bytes=elements * bits // 8 + 2 * (elements // group) * size,
                # the reference restores one expert at a time
                temporary_bytes=elements * size * (5 if bits == 4 else 4) // 2,
                make=make,
            )
        ]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        """Rounded with one gram of the rows of all experts: a gram each would take more memory
        than the experts do."""
        info, stored = _info(match), _format(candidate)
        weight = dense.weight_of(statistics).flatten(0, 1)
        tensors = stored.fit(weight, formats.rounding_of(statistics))
        codes = _stacked([tensors[name] for name in stored.names], info)
        return dict(zip(stored.names, codes, strict=True))

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """For rows in any order, each of the expert that `inputs["expert"]` [rows] names."""
        stored = _format(candidate)
        order = inputs["expert"].argsort(stable=True)
        counts = torch.bincount(inputs["expert"], minlength=_info(match).count)
        codes = (tensors[name] for name in stored.names)
        y = quantized_experts(
            inputs["x"][order], *codes, counts.cumsum(0), stored.bits, stored.group_size
        )
        return torch.empty_like(y).index_copy_(0, order, y)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, stored = match.site, _format(candidate)
        node = editor.node(site)
        given: list[Any] = list(node.args)
        offsets = given[2] if len(given) > 2 else node.kwargs["offs"]
        codes = [editor.tensor(site, name, tensors[name]) for name in stored.names]
        arguments = (given[0], *codes, offsets, stored.bits, stored.group_size)
        target = torch.ops.fxopt.quantized_experts.default
        editor.replace(site, editor.call(site, target, arguments, {}))


def grouped_call(info: ExpertsInfo, scenario: Scenario) -> OpCall:
    """The experts as they are: the price of keeping them."""

    def make(random: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        weight = random(info.count, info.out_features, info.in_features)

        def call(x: Tensor, offsets: Tensor) -> Tensor:
            if x.is_cuda and x.dtype == torch.bfloat16:
                return F.grouped_mm(x, weight.mT, offs=offsets)
            ends = offsets.tolist()
            parts = zip([0, *ends[:-1]], ends, weight, strict=True)
            return torch.cat([F.linear(x[start:end], one) for start, end, one in parts])

        return call

    elements = info.in_features * info.out_features
    size = info.dtype.itemsize
    return experts_call(
        "aten::_grouped_mm", "", info, scenario, expert_bytes=elements * size, make=make
    )


def experts_call(
    op: str,
    form: str,
    info: ExpertsInfo,
    scenario: Scenario,
    *,
    expert_bytes: int,
    temporary_bytes: int = 0,
    make: Callable[[Callable[..., Tensor]], Callable[[Tensor, Tensor], Tensor]],
) -> OpCall:
    """An op call on rows that are spread evenly at random. Experts that are hit are read whole.
    `make` gets what `dense.linear_call` gives, and returns the op of rows and offsets."""
    rows = scenario.batch * scenario.queries * info.chosen
    size = info.dtype.itemsize

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(info.dtype)

        drawn = torch.randint(info.count, (rows,), generator=torch.Generator().manual_seed(rows))
        offsets = torch.bincount(drawn, minlength=info.count).cumsum(0).int().to(device)
        function, x = make(random), random(rows, info.in_features)
        return lambda: function(x, offsets)

    sizes = f"e{info.count}m{rows}n{info.out_features}k{info.in_features}"
    return OpCall(
        op=op,
        key=f"{op.partition('::')[2]}/{form}{'/' if form else ''}{sizes}/{dense.short(info)}",
        flops=2.0 * rows * info.in_features * info.out_features,
        bytes_read=min(rows, info.count) * expert_bytes + rows * info.in_features * size,
        bytes_written=rows * info.out_features * size,
        weight_bytes=info.count * expert_bytes,
        temporary_bytes=temporary_bytes,
        run=run,
    )


def _stacked(codes: Sequence[Tensor], info: ExpertsInfo) -> list[Tensor]:
    return [tensor.unflatten(0, (info.count, info.out_features)) for tensor in codes]


def _flat(info: ExpertsInfo) -> tuple[int, int]:
    return info.count * info.out_features, info.in_features


def _info(match: Match) -> ExpertsInfo:
    assert isinstance(match.site.info, ExpertsInfo)
    return match.site.info


def _format(candidate: Candidate) -> Integer:
    stored = formats.of(candidate.parameters)
    assert isinstance(stored, Integer)
    return stored
