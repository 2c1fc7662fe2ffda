"""Other libraries' linear layers on one GPU, for `benchmarks/linear.py --peers`: those that import
here. What does not, or fails, is named with its reason.

The same sizes: int4 in groups of 128, e4m3 with a scale a row. Each is called as its documentation
has it: torchao's fp8 layer compiled, since it rounds x in calls of its own, the others eagerly.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from linear_timing import CACHE, ROWS, SHAPES, milliseconds, random
from torch import Tensor, nn

from fxopt.kernels.quantized_linear import quantize, unpack

Module = Callable[[Tensor], Tensor]


def dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def torchao_int4(weight: Tensor) -> Module:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int4WeightOnlyConfig,
        quantize_,
    )

    layer = dense(weight)
    # The layout of PyTorch's own kernel: the others need further packages.
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    quantize_(layer, config)
    return layer


def torchao_fp8(weight: Tensor) -> Module:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    layer = dense(weight)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return layer


def gemlite_int4(weight: Tensor) -> Module:
    from gemlite.helper import A16W4_HQQ_INT  # pyright: ignore[reportMissingImports]

    packed, scale, zero = quantize(weight, 4, 128)
    codes = unpack(packed, 4, 128, torch.float32).to(torch.uint8)
    return A16W4_HQQ_INT(device="cuda:0", dtype=weight.dtype).from_weights(codes, scale, zero)


PEERS: dict[str, tuple[str, float, Callable[[Tensor], Module], bool, float]] = {
    "torchao int4": ("torchao", 0.5, torchao_int4, False, 0.2),
    "torchao fp8": ("torchao", 1.0, torchao_fp8, True, 0.1),
    "gemlite int4": ("gemlite", 0.5, gemlite_int4, False, 0.2),
}
"""Package, bytes a weight, how it is made, whether it is compiled, and the greatest relative error
of a product with random weights."""


def measure(baseline: dict[tuple[int, int, int], float]) -> Iterator[dict[str, Any]]:
    for name, (package, *_) in PEERS.items():
        try:
            version = importlib.metadata.version(package)
            yield from _times(name, version, baseline)
        except Exception as problem:
            print(f"{name}: not measured, {type(problem).__name__}: {str(problem)[:200]}")


def _times(
    name: str, version: str, baseline: dict[tuple[int, int, int], float]
) -> Iterator[dict[str, Any]]:
    _, each, make, compiled, limit = PEERS[name]
    for k, n in SHAPES:
        weight = random(n, k)
        count = max(2, math.ceil(CACHE / (each * k * n)))
        modules = [(make(weight.clone()),) for _ in range(count)]
        for rows in ROWS:
            x = random(rows, k)
            call: Any = torch.compile(_apply, dynamic=False) if compiled else _apply
            with torch.no_grad():
                exact = x.double() @ weight.double().T
                seen = (call(x, *modules[0]).double() - exact).norm() / exact.norm()
                if not seen <= limit:
                    raise AssertionError(f"error {seen:.3g} at {rows} rows, {k} x {n}")
                ms, bf16 = milliseconds(call, x, modules), baseline[k, n, rows]
            yield {
                "kernel": name, "way": "op", "version": version, "in": k, "out": n, "rows": rows,
                "ms": round(ms, 5), "bf16_ms": round(bf16, 5), "ratio": round(bf16 / ms, 3),
            }  # fmt: skip


def _apply(x: Tensor, module: Any) -> Tensor:
    return module(x)
