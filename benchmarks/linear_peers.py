"""Other libraries' linear layers on one GPU, for `benchmarks/linear.py --peers`: those that import
here. What does not, or fails, is named with its reason.

The same sizes: int4 in groups of 128, e4m3 with a scale a row. torchao's fp8 layer is compiled,
since it rounds x in calls of its own; the others are one call.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from linear_timing import CACHE, ROWS, SHAPES, milliseconds, random
from torch import Tensor, nn

from fxopt.kernels.quantized_linear import quantize, unpack


def dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def torchao_int4(weight: Tensor) -> Any:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int4WeightOnlyConfig,
        quantize_,
    )

    layer = dense(weight)
    # The layout of PyTorch's own kernel: the others need further packages.
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    quantize_(layer, config)
    return layer.weight


def torchao_fp8(weight: Tensor) -> Any:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    layer = dense(weight)
    # Without a search over the compiler's options, which takes minutes here.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    quantize_(layer, config)
    return layer.weight


def gemlite_int4(weight: Tensor) -> Any:
    from gemlite.helper import A16W4_HQQ_INT  # pyright: ignore[reportMissingImports]

    packed, scale, zero = quantize(weight, 4, 128)
    codes = unpack(packed, 4, 128, torch.float32).to(torch.uint8)
    return A16W4_HQQ_INT(device="cuda:0", dtype=weight.dtype).from_weights(codes, scale, zero)


def linear(x: Tensor, weight: Any) -> Tensor:
    return F.linear(x, weight)


def called(x: Tensor, module: Any) -> Tensor:
    return module(x)


class Peer(NamedTuple):
    package: str
    bytes_each: float
    """Of a weight's element."""
    make: Callable[[Tensor], Any]
    call: Callable[[Tensor, Any], Tensor]
    """x and what `make` gave."""
    limit: float
    """The greatest relative error of a product with random weights."""
    compiled: bool = False


PEERS = {
    "torchao int4": Peer("torchao", 0.5, torchao_int4, linear, 0.2),
    "torchao fp8": Peer("torchao", 1.0, torchao_fp8, linear, 0.1, compiled=True),
    "gemlite int4": Peer("gemlite", 0.5, gemlite_int4, called, 0.2),
}


def measure(baseline: dict[tuple[int, int, int], float]) -> Iterator[dict[str, Any]]:
    for name, peer in PEERS.items():
        try:
            version = str(getattr(importlib.import_module(peer.package), "__version__", "unknown"))
            yield from _times(name, version, baseline)
        except Exception as problem:
            why = f"{type(problem).__name__}: {str(problem)[:200]}"
            print(f"{name}: not measured, {why}", flush=True)


def _times(
    name: str, version: str, baseline: dict[tuple[int, int, int], float]
) -> Iterator[dict[str, Any]]:
    peer = PEERS[name]
    call = torch.compile(peer.call, dynamic=False) if peer.compiled else peer.call
    for k, n in SHAPES:
        weight = random(n, k)
        count = max(2, math.ceil(CACHE / (peer.bytes_each * k * n)))
        made = [(peer.make(weight.clone()),) for _ in range(count)]
        for rows in ROWS:
            x = random(rows, k)
            with torch.no_grad():
                exact = x.double() @ weight.double().T
                seen = ((call(x, *made[0]).double() - exact).norm() / exact.norm()).item()
                if not seen <= peer.limit:
                    raise AssertionError(f"error {seen:.3g} at {rows} rows, {k} x {n}")
                ms, bf16 = milliseconds(call, x, made), baseline[k, n, rows]
            yield {
                "kernel": name, "way": "op", "version": version, "in": k, "out": n, "rows": rows,
                "ms": round(ms, 5), "bf16_ms": round(bf16, 5), "ratio": round(bf16 / ms, 3),
            }  # fmt: skip
