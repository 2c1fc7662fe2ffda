"""Formats that a weight can be stored in: what each takes, how it is fitted, what computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Editor, Parameters, SiteStatistics
from fxopt.ir.site import LinearInfo, Site, rows_of
from fxopt.ir.workload import Scenario
from fxopt.kernels import fp8_linear as fp8
from fxopt.kernels import quantized_linear as integer
from fxopt.kernels.quantized_linear.op import FUSED_ROWS, VECTOR_ROWS
from fxopt.passes.linear import dense, rounding
from fxopt.passes.linear.rounding import Rounding

Tensors = Mapping[str, Tensor]
Operation = tuple[Any, tuple[Any, ...]]
"""An op and its arguments."""


def rounding_of(statistics: SiteStatistics) -> Rounding | None:
    """How the weights of a site are rounded, whatever the format; decomposed once. None, that is
    to nearest, where no inputs were recorded: of a model without weights."""
    if not statistics.inputs:
        return None
    return statistics.once("rounding", lambda: Rounding.of(statistics.gram))


class Format(Protocol):
    """Tensors of one weight [out, in] by `names`, and the op that reads them."""

    @property
    def label(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def parameters(self) -> Parameters:
        """From which `of` makes the format again."""
        ...

    def fit(self, weight: Tensor, inputs: Rounding | None) -> dict[str, Tensor]:
        """The tensors by name, rounded for these inputs; None rounds to nearest."""
        ...

    def restored(self, tensors: Tensors) -> Tensor:
        """The weight [out, in] that the tensors stand for."""
        ...

    def run(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        """What the op returns, by its reference."""
        ...

    def operation(self, x: Any, tensors: Mapping[str, Any], bias: Any) -> Operation: ...

    def cost(self, info: LinearInfo, scenario: Scenario) -> OpCall:
        """The op call for a layer of these sizes."""
        ...


@dataclass(frozen=True)
class Integer:
    """Codes of `bits` with a scale and a zero point for each `group_size` input columns."""

    bits: int
    group_size: int
    whole: bool = False

    names = ("packed", "scale", "zero")

    @property
    def label(self) -> str:
        return f"int{self.bits}" + ("" if self.whole else f"-g{self.group_size}")

    @property
    def parameters(self) -> Parameters:
        return {"bits": self.bits, "group_size": self.group_size}

    def fit(self, weight: Tensor, inputs: Rounding | None) -> dict[str, Tensor]:
        fitted = rounding.quantize(weight, inputs, self.bits, self.group_size)
        return dict(zip(self.names, fitted, strict=True))

    def restored(self, tensors: Tensors) -> Tensor:
        packed, scale, zero = (tensors[name] for name in self.names)
        return integer.dequantize(packed, scale, zero, self.bits, self.group_size)

    def run(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        packed, scale, zero = (tensors[name] for name in self.names)
        return integer.REFERENCE(x, packed, scale, zero, bias, self.bits, self.group_size)

    def operation(self, x: Any, tensors: Mapping[str, Any], bias: Any) -> Operation:
        weight = (tensors[name] for name in self.names)
        target = torch.ops.fxopt.quantized_linear.default
        return target, (x, *weight, bias, self.bits, self.group_size)

    def cost(self, info: LinearInfo, scenario: Scenario) -> OpCall:
        size, elements = info.dtype.itemsize, info.in_features * info.out_features
        rows, bits, group = rows_of(info, scenario), self.bits, self.group_size

        def make(random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
            weight = integer.quantize(random(info.out_features, info.in_features), bits, group)

            def call(x: Tensor, *, bias: Tensor | None) -> Tensor:
                return integer.quantized_linear(x, *weight, bias, bits, group)

            return call, ()

        return dense.linear_call(
            "fxopt::quantized_linear",
            f"b{bits}g{group}",
            info,
            scenario,
            weight_bytes=elements * bits // 8 + 2 * (elements // group) * size,
            flops=2.0 * rows * elements,
            hidden_elements=elements if rows > FUSED_ROWS else 0,
            # What the reference holds at once of the steps from bytes to weight.
            temporary_bytes=elements * size * (5 if bits == 4 else 4) // 2,
            # More rows: sums in parts and their addition, or the weight restored and cuBLAS.
            launches=1 if rows <= VECTOR_ROWS else 2,
            make=make,
        )


@dataclass(frozen=True)
class Float8:
    """e4m3 with a scale a row; the op rounds the rows of its input likewise."""

    names = ("rounded", "scale")

    @property
    def label(self) -> str:
        return "fp8"

    @property
    def parameters(self) -> Parameters:
        return {"format": "fp8"}

    def fit(self, weight: Tensor, inputs: Rounding | None) -> dict[str, Tensor]:
        return dict(zip(self.names, rounding.quantize_fp8(weight, inputs), strict=True))

    def restored(self, tensors: Tensors) -> Tensor:
        return fp8.dequantize(tensors["rounded"], tensors["scale"])

    def run(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        return fp8.REFERENCE(x, tensors["rounded"], tensors["scale"], bias)

    def operation(self, x: Any, tensors: Mapping[str, Any], bias: Any) -> Operation:
        target = torch.ops.fxopt.fp8_linear.default
        return target, (x, tensors["rounded"], tensors["scale"], bias)

    def cost(self, info: LinearInfo, scenario: Scenario) -> OpCall:
        elements, rows = info.in_features * info.out_features, rows_of(info, scenario)

        def make(random: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
            weight = random(info.out_features, info.in_features)
            scale = fp8.row_scale(weight)
            return fp8.fp8_linear, (fp8.quantize(weight, scale), scale[:, 0].contiguous())

        return dense.linear_call(
            "fxopt::fp8_linear",
            "",
            info,
            scenario,
            weight_bytes=elements + 4 * info.out_features,
            flops=2.0 * rows * elements,
            hidden_elements=rows * info.in_features,
            # The reference widens the weight, and holds x rounded and its product in float32.
            temporary_bytes=elements * info.dtype.itemsize
            + rows * (5 * info.in_features + 4 * info.out_features),
            launches=1 if rows == 1 else 2,
            make=make,
        )


def integers(bits: Sequence[int], group_sizes: Sequence[int], in_features: int) -> list[Integer]:
    """Groups of `group_sizes` for 4 bits where they divide the input features; 8 bits take the
    largest of them that does, or else one scale a row."""
    groups = [g for g in sorted(group_sizes) if in_features % g == 0]
    found: list[Integer] = []
    if 8 in bits:
        group = groups[-1] if groups else in_features
        found.append(Integer(8, group, whole=group == in_features))
    if 4 in bits:
        found += [Integer(4, g, whole=g == in_features) for g in groups if g % 2 == 0]
    return found


def of(parameters: Parameters) -> Format:
    """The format that a candidate's parameters name."""
    if "format" in parameters:
        return Float8()
    return Integer(int(parameters["bits"]), int(parameters["group_size"]))


def insert(
    editor: Editor,
    site: Site,
    stored: Format,
    x: Any,
    tensors: Tensors,
    bias: Any,
    prefix: str = "",
) -> fx.Node:
    """Register `tensors` (named `prefix` and the format's names) and call the op on x."""
    nodes = {
        name: editor.tensor(site, prefix + name, tensors[prefix + name]) for name in stored.names
    }
    target, arguments = stored.operation(x, nodes, bias)
    return editor.call(site, target, arguments, {})


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that `prefixed` renamed, under their own names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
