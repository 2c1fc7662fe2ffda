"""Sizes of the attention kernels: tile shapes, warps and stages, timed one after another.

    python benchmarks/attention_sweep.py forward [--dims 64 128 256] [--out FILE]
    python benchmarks/attention_sweep.py backward [--dims 64 128 256]
    python benchmarks/attention_sweep.py estimate [--dims 64 128 256]

"forward" is under sink 64 + window 4,096 and under lists of 128x128 tiles at density 0.1, both at
32,768 tokens: what the table in kernels/attention/triton.py holds. "backward" does so for each of
the two kernels of the backward, under the window, "estimate" for the choice of tiles at 131,072
tokens. One JSON line a measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_cases import (
    DIM,
    HEADS,
    SHARES,
    SINK,
    TOPK_LENGTHS,
    WINDOW,
    Report,
    baseline,
    ms,
    qkv,
    random_lists,
    reporting,
    seconds,
)

from fxopt.kernels.attention.spec import bind
from fxopt.kernels.attention.triton import attention_forward
from fxopt.kernels.attention_backward.triton import attention_gradients, sizes_for
from fxopt.kernels.block_topk.triton import kept_lists

SWEEP_SECONDS = 130

# BLOCK_M, BLOCK_N, warps, stages, TMA
SWEEP = {
    64: [
        (128, 64, 4, 2, 1), (128, 64, 4, 3, 1), (128, 64, 4, 4, 1),
        (128, 128, 4, 2, 1), (128, 128, 8, 2, 1), (128, 128, 8, 3, 1),
        (64, 64, 4, 3, 1), (64, 128, 4, 2, 1), (256, 64, 8, 3, 1),
    ],
    128: [
        (128, 128, 8, 2, 1), (128, 128, 8, 3, 1),
        (128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 64, 8, 4, 1),
        (128, 64, 4, 2, 1), (128, 32, 4, 4, 1),
        (64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (64, 128, 4, 2, 1),
        (128, 64, 8, 3, 0), (128, 128, 8, 2, 0), (128, 64, 4, 2, 0),
    ],
    256: [
        (128, 64, 8, 2, 1), (128, 32, 8, 2, 1), (128, 32, 8, 3, 1),
        (64, 64, 4, 2, 1), (64, 32, 4, 2, 1), (64, 32, 4, 3, 1),
    ],
}  # fmt: skip
# BLOCK_M, STEPS, warps, stages
SWEEP_ESTIMATE = [
    (64, 8, 4, 2), (64, 16, 4, 2), (64, 16, 4, 3), (128, 8, 8, 2), (128, 16, 8, 2), (128, 32, 8, 2),
    (128, 16, 8, 3), (128, 32, 8, 3), (128, 16, 4, 2), (128, 32, 4, 3), (256, 16, 8, 2),
]  # fmt: skip
# As SWEEP, for the kernel of dQ and for that of dK and dV.
SWEEP_BACKWARD = {
    64: (
        [(128, 64, 4, 2, 1), (128, 128, 8, 2, 1), (64, 128, 4, 2, 1), (128, 64, 4, 3, 1),
         (128, 128, 4, 2, 1), (64, 64, 4, 3, 1)],
        [(64, 128, 4, 2, 1), (64, 128, 8, 2, 1), (128, 128, 8, 2, 1), (64, 64, 4, 2, 1),
         (64, 128, 8, 3, 1), (32, 128, 4, 3, 1)],
    ),
    128: (
        [(128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 128, 8, 2, 1), (64, 128, 4, 2, 1),
         (64, 64, 4, 2, 1), (128, 32, 4, 2, 1), (128, 64, 4, 2, 1)],
        [(64, 128, 8, 2, 1), (64, 128, 8, 3, 1), (32, 128, 8, 3, 1), (64, 64, 4, 2, 1),
         (32, 128, 4, 2, 1), (32, 64, 4, 3, 1), (128, 64, 8, 2, 1)],
    ),
    256: (
        [(64, 64, 8, 2, 1), (64, 32, 4, 2, 1), (64, 64, 8, 1, 1), (128, 32, 8, 1, 1)],
        [(32, 64, 8, 2, 1), (64, 64, 8, 1, 1), (32, 64, 8, 1, 1), (64, 64, 8, 2, 1)],
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", choices=list(SWEEPS))
    parser.add_argument("--dims", nargs="*", type=int, default=[128, 64, 256])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    reporting(args.out, partial(SWEEPS[args.kernel], args.dims))


def sweep_backward(dims: list[int], report: Report) -> None:
    """Each kernel with the other at the sizes of the table."""
    start, length = time.monotonic(), 32768
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA")
    for dim in dims:
        q, k, v = qkv(length, dim)
        call = bind(q, k, v, None, None, None, dim**-0.5, True, [WINDOW], 0.0, [SINK])
        gradient = torch.randn_like(q.transpose(1, 2))
        run = partial(attention_gradients, gradient, *attention_forward(call), call, None)
        chosen = sizes_for(dim, dim, 2, True)
        expected = run(chosen)
        for which, config in ((i, c) for i in (0, 1) for c in SWEEP_BACKWARD[dim][i]):
            if time.monotonic() - start > SWEEP_SECONDS:
                report(out_of_time=config)
                return
            sizes = list(chosen)
            sizes[which] = dict(zip(names, config, strict=True))
            line: dict[str, Any] = {"dim": dim, "kernel": ("dq", "dk dv")[which], "config": config}
            try:
                found = run(tuple(sizes))
                line["agrees"] = all(
                    bool((found[n] - x).norm() < 0.01 * x.norm()) for n, x in expected.items()
                )
                line["both_ms"] = ms(seconds(partial(run, tuple(sizes)), 0.1))
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:100]
            report(**line)


def sweep_estimate(dims: list[int], report: Report) -> None:
    """The choice of tiles alone, as a part of what the library takes for 128 channels."""
    start, length = time.monotonic(), TOPK_LENGTHS[-1]
    names = ("BLOCK_M", "STEPS", "num_warps", "num_stages")
    for dim in dims:
        given = (None, None, None, dim**-0.5, True, [0], 0.0, [0], [SHARES[0]])
        call = bind(*qkv(length, dim), *given)
        for config in SWEEP_ESTIMATE:
            if time.monotonic() - start > SWEEP_SECONDS:
                report(out_of_time=config)
                return
            line: dict[str, Any] = {"dim": dim, "config": config}
            try:
                sizes = dict(zip(names, config, strict=True))
                line["ms"] = ms(found := seconds(partial(kept_lists, call, **sizes), 0.1))
                line["of_dense"] = round(found / baseline(length), 4) if dim == DIM else None
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:100]
            report(**line)


def sweep(dims: list[int], report: Report) -> None:
    start, length = time.monotonic(), 32768
    for dim in dims:
        q, k, v = qkv(length, dim)
        plain = bind(q, k, v, None, None, None, dim**-0.5, True, [0], 0.0, [0])
        window = bind(q, k, v, None, None, None, dim**-0.5, True, [WINDOW], 0.0, [SINK])
        lists = random_lists(length, length, HEADS, 0.1, 128)
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA")
        for config in SWEEP[dim]:
            if time.monotonic() - start > SWEEP_SECONDS:
                report(out_of_time=config)
                return
            sizes = dict(zip(names, config, strict=True))
            cases = {"window": (window, None), "lists": (plain, lists)}
            line: dict[str, Any] = {"dim": dim, "config": config}
            for name, (call, chosen) in cases.items():
                try:
                    line[name] = ms(
                        seconds(lambda c=call, x=chosen, s=sizes: attention_forward(c, x, **s), 0.1)
                    )
                except Exception as error:
                    line[name] = f"{type(error).__name__}: {error}"[:100]
            report(**line)


SWEEPS: dict[str, Callable[[list[int], Report], None]] = {
    "forward": sweep, "backward": sweep_backward, "estimate": sweep_estimate,
}  # fmt: skip

if __name__ == "__main__":
    main()
