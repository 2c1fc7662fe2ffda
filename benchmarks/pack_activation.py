"""Seconds and bytes/s of packing and unpacking activations, beside a copy of the same tensor.

    python benchmarks/pack_activation.py [--values 268435456] [--dtype bfloat16]

One JSON line a format. `copy` is `clone()`, which reads and writes 16 bits a value where packing
writes half or a quarter; `ratio` is to it. `codes` and `times` are those of a derivative, which
`gelu_backward` computes from the values. Codes are compared with the reference first, on a part of
the values. Medians of CUDA events around single calls.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from fxopt.kernels.activation_function import code_bytes, derivative_codes, times_derivative
from fxopt.kernels.activation_function import reference as derivative
from fxopt.kernels.pack_activation import (
    REFERENCE,
    pack_activation,
    packed_bytes,
    unpack_activation,
)

CHECKED = 1_000_003


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=2**28)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--group", type=int, default=128)
    args = parser.parse_args()
    x = torch.randn(args.values, device="cuda", dtype=getattr(torch, args.dtype))
    copy = seconds(x.clone)
    print(json.dumps({"run": "copy", "ms": 1e3 * copy, "TB/s": 2e-12 * x.nbytes / copy}))
    for bits in (8, 4):
        check(x[:CHECKED], bits, args.group)
        codes, top = pack_activation(x, bits, args.group)
        moved = x.nbytes + packed_bytes(args.values, x.dtype, bits, args.group)
        calls: dict[str, Callable[[], Any]] = {
            "pack": lambda bits=bits: pack_activation(x, bits, args.group),
            "unpack": lambda codes=codes, top=top, bits=bits: unpack_activation(
                codes, top, x.shape, x.stride(), bits, args.group
            ),
        }
        for name, call in calls.items():
            taken = seconds(call)
            line = {"run": name, "bits": bits, "ms": 1e3 * taken, "TB/s": 1e-12 * moved / taken}
            print(json.dumps({**line, "ratio": taken / copy}), flush=True)
    derivatives(x, copy)


def derivatives(x: torch.Tensor, copy: float) -> None:
    """Codes of a derivative, and gradients times it."""
    gradient = torch.randn_like(x)
    exact = seconds(lambda: torch.ops.aten.gelu_backward(gradient, x))
    moved = 3 * x.nbytes
    print(json.dumps({"run": "gelu_backward", "ms": 1e3 * exact, "TB/s": 1e-12 * moved / exact}))
    for bits in (1, 2, 3, 4):
        borders = torch.linspace(-2, 2, 2**bits - 1).tolist()
        levels = torch.linspace(0, 1, 2**bits).tolist()
        codes = derivative_codes(x, borders, bits)
        part = x[:CHECKED].cpu(), gradient[:CHECKED].cpu()
        whole = derivative.derivative_codes(part[0], borders, bits)
        mine = derivative_codes(x[:CHECKED], borders, bits)
        assert torch.equal(mine.cpu(), whole), f"{bits} bits differ from the reference"
        product = times_derivative(gradient[:CHECKED], mine, (1,), levels, bits)
        assert torch.equal(
            product.cpu(), derivative.times_derivative(part[1], whole, (1,), levels, bits)
        )
        stored = code_bytes(x.numel(), bits)
        calls: dict[str, tuple[int, Callable[[], Any]]] = {
            "codes": (
                x.nbytes + stored,
                lambda borders=borders, bits=bits: derivative_codes(x, borders, bits),
            ),
            "times": (
                2 * x.nbytes + stored,
                lambda codes=codes, levels=levels, bits=bits: times_derivative(
                    gradient, codes, x.stride(), levels, bits
                ),
            ),
        }
        for name, (bytes_, call) in calls.items():
            taken = seconds(call)
            line = {"run": name, "bits": bits, "ms": 1e3 * taken, "TB/s": 1e-12 * bytes_ / taken}
            print(json.dumps({**line, "ratio": taken / copy}), flush=True)


def check(x: torch.Tensor, bits: int, group: int) -> None:
    """The kernel's codes are the reference's, and what comes back is within half a step."""
    codes, top = pack_activation(x, bits, group)
    for mine, reference in zip((codes, top), REFERENCE(x.cpu(), bits, group), strict=True):
        assert torch.equal(mine.cpu(), reference), f"{bits} bits differ from the reference"
    out = unpack_activation(codes, top, x.shape, x.stride(), bits, group)
    step = top.double().repeat_interleave(group)[: x.numel()] / (2 ** (bits - 1) - 1)
    off = (out.double() - x.double()).abs()
    assert (off <= 0.501 * step + torch.finfo(x.dtype).eps * out.double().abs()).all()


def seconds(call: Callable[[], Any], runs: int = 30) -> float:
    """Median of single calls, after two that warm up."""
    call(), call()
    times: list[float] = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end))
    return sorted(times)[runs // 2]


if __name__ == "__main__":
    main()
