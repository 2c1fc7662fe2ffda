"""Linear kernels against cuBLAS bf16 on a GPU: correctness, then time by shape and rows.

    python benchmarks/linear.py [--only int4] [--out linear.jsonl]
    python benchmarks/linear.py --sweep decode|decode8|small|few|fp8|low-rank   # configurations
    python benchmarks/linear.py --epilogues     # what follows a product, in its launch and apart
    python benchmarks/linear.py --peers         # torchao and gemlite, where they import, as well

Each time is that of one call among many in a CUDA graph, where every call has a weight of its
own: together they are several times the second-level cache, so weights come from memory, as in a
model. Inputs stay in the cache. Ratios are to `F.linear` in bf16, timed likewise in this run;
`op` is what the operator dispatches to, other rows are its parts. Prints one JSON line for each
time, then a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from linear_low_rank import half_rank
from linear_low_rank import sweep as sweep_low_rank
from linear_peers import measure as measure_peers
from linear_timing import (
    ROWS,
    SHAPES,
    Call,
    Weight,
    bf16,
    copies,
    error,
    milliseconds,
    random,
)
from torch import Tensor

from fxopt.kernels._triton import few_rows, vector
from fxopt.kernels.fp8_linear import dequantize as dequantize_fp8
from fxopt.kernels.fp8_linear import fp8_linear, row_scale
from fxopt.kernels.fp8_linear import quantize as quantize_fp8
from fxopt.kernels.fp8_linear import triton as fp8_triton
from fxopt.kernels.gated import gated
from fxopt.kernels.low_rank_linear import REFERENCE as low_rank_reference
from fxopt.kernels.low_rank_linear import low_rank_linear
from fxopt.kernels.low_rank_linear import triton as low_rank_triton
from fxopt.kernels.monarch_linear import REFERENCE as monarch_reference
from fxopt.kernels.monarch_linear import dense, monarch_linear
from fxopt.kernels.monarch_linear import triton as monarch_triton
from fxopt.kernels.quantized_linear import dequantize, quantize, quantized_linear
from fxopt.kernels.quantized_linear import triton as quantized_triton


class Kernel(NamedTuple):
    make: Callable[[int, int], Weight]
    """The weight's tensors from in and out features."""
    op: Call
    restored: Callable[..., Tensor]
    """The float64 weight [out, in] that the tensors stand for."""
    parts: dict[str, tuple[int, int, Call]]
    """Other ways to compute it: from and up to which number of rows, and how."""


def integer(bits: int) -> Kernel:
    def op(x: Tensor, *weight: Tensor) -> Tensor:
        return quantized_linear(x, *weight, None, bits, 128)

    def fused(x: Tensor, *weight: Tensor) -> Tensor:
        return quantized_triton.quantized_linear(x, *weight, None, bits, 128)

    def restored_first(x: Tensor, *weight: Tensor) -> Tensor:
        return F.linear(x, quantized_triton.dequantize(*weight, bits, 128))

    def restored(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return dequantize(packed, scale.double(), zero.double(), bits, 128)

    return Kernel(
        lambda k, n: quantize(random(n, k), bits, 128),
        op,
        restored,
        {"fused": (256, 1024, fused), "dequantise + cuBLAS": (256, 4096, restored_first)},
    )


def float8() -> Kernel:
    def make(k: int, n: int) -> Weight:
        weight = random(n, k)
        scale = row_scale(weight)
        return quantize_fp8(weight, scale), scale[:, 0].contiguous()

    def op(x: Tensor, *weight: Tensor) -> Tensor:
        return fp8_linear(x, *weight, None)

    def library(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        rows, own = fp8_triton.quantize_rows(x)
        scaled: Any = torch.ops.aten._scaled_mm.default
        return scaled(rows, weight.t(), own, scale[None], None, None, x.dtype, True)

    def restored(weight: Tensor, scale: Tensor) -> Tensor:
        return dequantize_fp8(weight, scale).double()

    parts = {
        "quantise + few rows": (1, 16, lambda x, *w: fp8_triton.fp8_linear(x, *w, None)),
        "quantise + _scaled_mm": (1, 16, library),
    }
    return Kernel(make, op, restored, parts)


def low_rank() -> Kernel:
    def make(k: int, n: int) -> Weight:
        rank = half_rank(k, n)
        return random(rank, k) / math.sqrt(k), random(n, rank)

    return Kernel(
        make,
        lambda x, *weight: low_rank_linear(x, *weight, None),
        lambda down, up: up.double() @ down.double(),
        {
            "cuBLAS": (1, 4096, lambda x, *w: low_rank_reference(x, *w, None)),
            "kernels": (1, 16, lambda x, *w: low_rank_triton.low_rank_linear(x, *w, None)),
        },
    )


def monarch() -> Kernel:
    def make(k: int, n: int) -> Weight:
        rank = round(k * n / (k + n) / 2 / 4 / 16) * 16
        return random(4, 4 * rank, k // 4) / math.sqrt(k), random(4, n // 4, 4 * rank)

    return Kernel(
        make,
        lambda x, *weight: monarch_linear(x, *weight, None),
        lambda right, left: dense(right.double(), left.double()),
        {
            "bmm": (1, 4096, lambda x, *w: monarch_reference(x, *w, None)),
            "kernel": (17, 4096, lambda x, *w: monarch_triton.monarch_linear(x, *w, None)),
        },
    )


KERNELS: dict[str, Callable[[], Kernel]] = {
    "int4": lambda: integer(4),
    "int8": lambda: integer(8),
    "fp8": float8,
    "low-rank": low_rank,
    "monarch": monarch,
}


def check(name: str) -> None:
    """Every way of computing, at sizes of each kind; raises where one is off."""
    kernel = KERNELS[name]()
    for (k, n), rows in itertools.product(((1024, 512), (2048, 1536)), (1, 5, 16, 33, 64, 300)):
        weight, x = kernel.make(k, n), random(rows, k)
        ways = {"op": kernel.op}
        ways |= {p: call for p, (low, high, call) in kernel.parts.items() if low <= rows <= high}
        for part, call in ways.items():
            # fp8 rounds x as well: to 2^-4 at most, a few hundredths over a sum.
            seen = error(call(x, *weight), x, kernel.restored(*weight))
            if not seen <= (40 if name == "fp8" else 6):
                raise AssertionError(f"{name} {part}, {rows} rows, {k} x {n}: error {seen:.3g}")
    print(json.dumps({"check": name, "passed": True}), flush=True)


def measure(name: str, baseline: dict[tuple[int, int, int], float]) -> Iterator[dict[str, Any]]:
    kernel = KERNELS[name]()
    for k, n in SHAPES:
        weights = copies(kernel.make(k, n))
        for rows in ROWS:
            x = random(rows, k)
            ways = {"op": kernel.op}
            ways |= {p: c for p, (low, high, c) in kernel.parts.items() if low <= rows <= high}
            for part, call in ways.items():
                ms, bf16 = milliseconds(call, x, weights), baseline[k, n, rows]
                yield {
                    "kernel": name, "way": part, "in": k, "out": n, "rows": rows,
                    "ms": round(ms, 5), "bf16_ms": round(bf16, 5), "ratio": round(bf16 / ms, 3),
                }  # fmt: skip


def table(results: list[dict[str, Any]]) -> None:
    print(f"\n{'ratio to cuBLAS bf16':<32}" + "".join(f"{f'M={m}':>9}" for m in ROWS))
    names = dict.fromkeys(r["kernel"] for r in results)
    for name, (k, n), way in itertools.product(names, SHAPES, dict.fromkeys(_ways(results))):
        found = {
            r["rows"]: r["ratio"]
            for r in results
            if (r["kernel"], r["in"], r["out"], r["way"]) == (name, k, n, way)
        }
        if found:
            label = f"{name} {k}x{n}" if way == "op" else f"  {way}"
            cells = (f"{found[m]:.2f}x" if m in found else "" for m in ROWS)
            print(f"{label:<32}" + "".join(f"{cell:>9}" for cell in cells))


def _ways(results: list[dict[str, Any]]) -> list[str]:
    return ["op", *(r["way"] for r in results if r["way"] != "op")]


def gate_and_up(bits: int) -> tuple[Call, Call]:
    """silu(x Wg) * (x Wu) in one call, and in three."""

    def joined(x: Tensor, *weights: Tensor) -> Tensor:
        return quantized_linear(x, *weights[:3], None, bits, 128, "silu", None, *weights[3:])

    def apart(x: Tensor, *weights: Tensor) -> Tensor:
        gate, up = (quantized_linear(x, *w, None, bits, 128) for w in (weights[:3], weights[3:]))
        return gated(gate, up, "silu")

    return joined, apart


def down_and_residual(bits: int) -> tuple[Call, Call]:
    """x W + residual in one call, and in two."""

    def joined(x: Tensor, residual: Tensor, *weight: Tensor) -> Tensor:
        return quantized_linear(x, *weight, None, bits, 128, "", residual)

    def apart(x: Tensor, residual: Tensor, *weight: Tensor) -> Tensor:
        return quantized_linear(x, *weight, None, bits, 128) + residual

    return joined, apart


Apart = tuple[Call, Call]
FOLLOWED: dict[str, tuple[Callable[[], Apart], Callable[[], Apart]]] = {
    "int4": (lambda: gate_and_up(4), lambda: down_and_residual(4)),
    "int8": (lambda: gate_and_up(8), lambda: down_and_residual(8)),
    "fp8": (lambda: pair(fp8_linear), lambda: added(fp8_linear)),
    "low-rank": (lambda: pair(low_rank_linear), lambda: added(low_rank_linear)),
}
"""Gate, up and SiLU, and a product and its residual, each in one call and in several."""


def pair(op: Call) -> Apart:
    """As `gate_and_up`, for an op whose weight is two tensors."""
    return (
        lambda x, *w: op(x, *w[:2], None, "silu", None, *w[2:]),
        lambda x, *w: gated(op(x, *w[:2], None), op(x, *w[2:], None), "silu"),
    )


def added(op: Call) -> Apart:
    return (
        lambda x, residual, *w: op(x, *w, None, "", residual),
        lambda x, residual, *w: op(x, *w, None) + residual,
    )


def epilogues() -> None:
    """Microseconds of what follows a product in its own launch, and as launches of its own."""
    print(f"{'':<48}{'apart, us':>12}{'joined, us':>12}{'ratio':>8}")
    for name, rows in itertools.product(FOLLOWED, (1, 2, 16)):
        make, calls = KERNELS[name]().make, FOLLOWED[name]
        gate, down = (*make(4096, 14336), *make(4096, 14336)), make(14336, 4096)
        residual = random(rows, 4096)
        cases = (
            ("gate + up + SiLU 4096 x 14336", 4096, (), gate, calls[0]()),
            ("down + residual 14336 x 4096", 14336, (residual,), down, calls[1]()),
        )
        for what, k, given, weight, (joined, apart) in cases:
            x, weights = random(rows, k), [(*given, *copy) for copy in copies(weight)]
            # The same sums, if not in the same tiles.
            one, several = joined(x, *weights[0]).float(), apart(x, *weights[0]).float()
            if not (one - several).norm() <= 0.02 * several.norm():
                raise AssertionError(f"{name} {what}, {rows} rows: joined and apart differ")
            times = [1000 * milliseconds(call, x, weights) for call in (apart, joined)]
            label, ratio = f"{name} {what}, M={rows}", times[0] / times[1]
            print(f"{label:<48}{times[0]:>12.2f}{times[1]:>12.2f}{ratio:>8.2f}", flush=True)


Sweep = tuple[tuple[tuple[int, int], ...], tuple[int, ...], list[Any]]


def sweeps(name: str) -> Sweep:
    """Shapes, rows and configurations."""
    product, make = itertools.product, quantized_triton.Configuration
    if name.startswith("decode"):
        found = [
            *(vector.Vector(n, k, 4) for n, k in product((2, 4, 8, 16), (1024, 2048))),
            *(vector.Vector(n, 512, 2) for n in (4, 8)),
            *(vector.Vector(n, 2048, 8) for n in (4, 8)),
            *(vector.Vector(n, 1024, 4, 3) for n in (4, 8)),
            *(vector.Vector(n, 8192, 8) for n in (2, 4)),
            *(vector.Vector(n, k, 4, 1, True) for n, k in product((4, 8), (1024, 2048))),
            *(make(16, 64, 64, splits, 4, 4) for splits in (1, 2, 4, 8)),
            *(make(16, 128, 64, splits, 4, 4) for splits in (2, 4)),
            make(16, 32, 64, 4, 2, 6),
            *(make(16, 64, 64, s, 4, n, 1, False, True) for s, n in product((1, 2, 4, 8), (4, 6))),
            *(make(16, 64, 64, s, 4, 4, 1, True, True) for s in (2, 4)),
            *(make(16, 128, 64, s, w, 4, 1, False, True) for s, w in product((2, 4), (4, 8))),
        ]
        if name == "decode8":
            found += [make(16, n, 128, s, 4, 3) for n, s in product((64, 128), (2, 4))]
            found += [make(16, 64, 128, s, 4, 3, 1, False, True) for s in (2, 4)]
        return SHAPES, (1, 2, 4, 16), found
    if name == "small":
        found = [
            *(make(m, 64, 64, s, 4, 4, 1, True) for m, s in product((32, 64), (1, 2))),
            make(128, 64, 64, 1, 4, 3, 1, True),
            make(128, 64, 64, 2, 4, 3, 1, True),
            *(
                make(m, 64, 64, s, 4, 4, 1, first, True)
                for m, s, first in product((32, 64), (1, 2, 4), (True, False))
            ),
            *(make(m, 128, 64, s, 8, 4, 1, True, True) for m, s in product((32, 64), (2, 4))),
            *(make(128, 64, 64, s, 4, 4, 1, True, True) for s in (1, 2, 4)),
            *(make(128, 128, 64, s, 8, 4, 1, True, True) for s in (1, 2, 4)),
            *(
                make(256, n, 64, s, n // 16, 3, 1, True, True)
                for n, s in product((64, 128), (1, 2, 4))
            ),
        ]
        return SHAPES, (32, 64, 256), found
    if name == "fp8":
        found = [
            *(fp8_triton.Vector(n, k, 4) for n, k in product((2, 4, 8), (1024, 2048))),
            *(fp8_triton.Vector(n, k, 8) for n, k in product((2, 4, 8), (2048, 4096))),
        ]
        return SHAPES, (1,), found
    shapes = ((4096, 1024), (1024, 4096), (4096, 1536), (1536, 14336), (14336, 1536))
    found = [
        few_rows.Configuration(n, k, 4, stages)
        for n, k, stages in product((16, 32, 64), (64, 128, 256), (4, 7))
        if n * k * stages < 64 * 128 * 7 and (n, k) not in {(16, 64), (64, 256)}
    ]
    return shapes, (1, 16), found


def configured(name: str, chosen: Any) -> Call:
    """The swept kernel with one configuration."""
    if name == "few":
        return lambda x, w: few_rows.linear(
            x, w, None, x.new_empty((len(x), len(w))), chosen=chosen
        )
    if name == "fp8":
        return lambda x, *w: fp8_triton.one_row(x, *w, None, chosen)
    bits = 8 if name == "decode8" else 4
    return lambda x, *w: quantized_triton.quantized_linear(x, *w, None, bits, 128, chosen)


SWEPT = {
    "decode": KERNELS["int4"],
    "decode8": KERNELS["int8"],
    "small": KERNELS["int4"],
    "few": lambda: Kernel(lambda k, n: (random(n, k),), F.linear, lambda w: w.double(), {}),
    "fp8": KERNELS["fp8"],
}


def serves(chosen: Any, rows: int) -> bool:
    return rows <= vector.ROWS or not isinstance(chosen, vector.Vector)


def compile_one(name: str, chosen: Any) -> tuple[Any, str]:
    """Fill the compiler's cache in a process of its own; the configuration, and what is wrong."""
    torch.manual_seed(0)
    shapes, rows, _ = sweeps(name)
    try:
        kernel, call = SWEPT[name](), configured(name, chosen)
        for k, count in itertools.product(sorted({k for k, _ in shapes}), rows):
            if serves(chosen, count):
                weight, x = kernel.make(k, 512), random(count, k)
                seen = error(call(x, *weight), x, kernel.restored(*weight))
                if not seen <= (40 if name == "fp8" else 6):
                    return chosen, f"error {seen:.3g} at {count} rows"
        return chosen, ""
    except Exception as problem:
        return chosen, f"{type(problem).__name__}: {str(problem)[:100]}"


def sweep(name: str) -> None:
    shapes, rows, found = sweeps(name)
    begin, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(14, mp_context=context, max_tasks_per_child=4) as pool:
        built = list(pool.map(compile_one, itertools.repeat(name), found))
    for chosen, problem in built:
        if problem:
            print(json.dumps({"config": list(chosen), "problem": problem}), flush=True)
    good = [chosen for chosen, problem in built if not problem]
    print(f"{len(good)} of {len(found)} built in {time.perf_counter() - begin:.0f} s", flush=True)
    baseline = bf16(shapes, rows)
    for k, n in shapes:
        weights = copies(SWEPT[name]().make(k, n))
        for count in rows:
            x = random(count, k)
            times = sorted(
                (
                    (milliseconds(configured(name, c), x, weights), c)
                    for c in good
                    if serves(c, count)
                ),
                key=lambda timed: timed[0],
            )
            dense_ms = baseline[k, n, count]
            print(f"\n{k} x {n}, {count} rows, bf16 {1000 * dense_ms:.2f} us")
            for ms, chosen in times[:12]:
                print(f"  {1000 * ms:7.2f} us {dense_ms / ms:5.2f}x  {chosen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--sweep", choices=(*SWEPT, "low-rank"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epilogues", action="store_true")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    begin = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if args.sweep == "low-rank":
        return sweep_low_rank()
    if args.sweep:
        return sweep(args.sweep)
    if args.epilogues:
        return epilogues()
    names = [name for name in KERNELS if args.only in name]
    for name in names:
        check(name)
    print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    baseline, results = bf16(SHAPES, ROWS), []
    found = itertools.chain.from_iterable(measure(name, baseline) for name in names)
    for result in itertools.chain(found, measure_peers(baseline) if args.peers else ()):
        print(json.dumps(result), flush=True)
        results.append(result)
    table(results)
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.out:
        args.out.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
