"""Running a module with the roundings to e4m3 that onnxruntime made.

Rounding is no continuous function: noise of 1e-7 in a layer's input moves some numbers by a step of
up to an eighth, and what follows by percents. What can be compared is the same computation with
the same roundings, and that each of those is one that an input within the tolerance has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.fp8_linear.reference import DTYPE, LARGEST
from .packed import Rounded
from .registry import references, register_ops

OUTPUT = "rounded."
"""How the outputs are called that `expose_roundings` adds."""


class Aligned(TorchDispatchMode):
    """While this is active, a cast to e4m3 gives the numbers among `choices` (float32) that an
    input within `tolerance` of the row's largest is cast to; its own where there are none."""

    def __init__(self, choices: Sequence[Tensor], tolerance: float, rounded: Rounded) -> None:
        super().__init__()
        self.choices = list(choices)
        self.slack = tolerance * LARGEST
        self.rounded = rounded
        register_ops()
        # What these ops do inside is seen where they run as their references.
        self.opened: Mapping[Any, Any] = {
            getattr(torch.ops.fxopt, name).default: references()[name]
            for name in ("chunked", "fp8_linear")
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.opened:
            with self:
                return self.opened[func](*args, **kwargs)
        result = func(*args, **kwargs)
        return self._choose(args[0], result) if _rounds(args, result) else result

    def _choose(self, x: Tensor, own: Tensor) -> Tensor:
        """Inputs are rows divided by their scales, so that the largest of each is 448."""
        low, high = (
            (x + shift).clamp(-LARGEST, LARGEST).to(DTYPE).float()
            for shift in (-self.slack, self.slack)
        )
        for choice in self.choices:
            if choice.shape == x.shape and bool(((low <= choice) & (choice <= high)).all()):
                self.rounded.count(own.float(), choice)
                return choice.to(DTYPE)
        return own


def _rounds(args: Sequence[Any], result: Any) -> bool:
    """Whether a call casts to e4m3."""
    if not isinstance(result, Tensor) or result.dtype != DTYPE:
        return False
    return isinstance(args[0], Tensor) and args[0].dtype.itemsize > 1


def expose_roundings(model: Any) -> bool:
    """Make every cast to e4m3 of an ONNX model an output in float32; whether there are any."""
    import onnx_ir as ir

    casts = [node for node in model.graph if _casts(node, ir)]
    for index, node in enumerate(casts):
        wide = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT})
        wide.outputs[0].name = f"{OUTPUT}{index}"
        wide.outputs[0].dtype = ir.DataType.FLOAT
        wide.outputs[0].shape = node.outputs[0].shape
        model.graph.append(wide)
        model.graph.outputs.append(wide.outputs[0])
    return bool(casts)


def _casts(node: Any, ir: Any) -> bool:
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to.as_int() == ir.DataType.FLOAT8E4M3FN
