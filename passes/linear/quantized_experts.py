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
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import ExpertsInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.quantized_experts import quantized_experts
from fxopt.kernels.quantized_linear import quantize
from fxopt.passes.linear import dense, formats
from fxopt.passes.linear.codes import Codes, format_of


@dataclass(frozen=True)
class QuantizedExperts(Codes):
    """`bits` and `group_sizes` as those of `linear.quantized`."""

    name: ClassVar[str] = "linear.quantized_experts"
    groups: ClassVar[str] = "experts"
    rounds: ClassVar[bool] = True

    def sizes(self, site: Site) -> ExpertsInfo | Refusal:
        if not isinstance(site.info, ExpertsInfo):
            return Refusal(f"{site.family} site: the rewrite serves experts of a mixture")
        if site.blocked is not None:
            return Refusal(site.blocked)
        return dense.unfit(site.info) or site.info

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        info, stored = _info(match), format_of(candidate)
        bits, group, size = stored.bits, stored.group_size, info.dtype.itemsize
        elements = info.in_features * info.out_features

        def make(random: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            weight = random(info.count * info.out_features, info.in_features)
            codes = _stacked(quantize(weight, bits, group), info.count)

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
        stored, weight = format_of(candidate), dense.weight_of(statistics)
        tensors = stored.fit(weight.flatten(0, 1), formats.rounding_of(statistics))
        codes = _stacked([tensors[name] for name in stored.names], len(weight))
        return dict(zip(stored.names, codes, strict=True))

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """For rows in any order, each of the expert that `inputs["expert"]` [rows] names."""
        stored = format_of(candidate)
        codes = [tensors[name] for name in stored.names]
        order = inputs["expert"].argsort(stable=True)
        counts = torch.bincount(inputs["expert"], minlength=len(codes[0]))
        y = quantized_experts(
            inputs["x"][order], *codes, counts.cumsum(0), stored.bits, stored.group_size
        )
        return torch.empty_like(y).index_copy_(0, order, y)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        site, stored = match.site, format_of(candidate)
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


def _stacked(codes: Sequence[Tensor], experts: int) -> list[Tensor]:
    return [tensor.unflatten(0, (experts, -1)) for tensor in codes]


def _info(match: Match) -> ExpertsInfo:
    assert isinstance(match.site.info, ExpertsInfo)
    return match.site.info
