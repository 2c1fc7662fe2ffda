"""Attention kernels against the library's fastest dense kernel: windows and block-sparse masks.

    python benchmarks/attention.py [--only STEP ...] [--out FILE]

32 query heads, 8 KV heads, head size 128, bfloat16, causal, forward. The baseline is the faster of
SDPA's cuDNN and flash backends at the same length, measured in the same run. "speedup" is baseline
over ours; for block-sparse masks "overhead" is our time over density times baseline, where density
is the part of the causal (query, key) pairs that is kept. Medians of CUDA events. Results are
checked against float64 first. One JSON line a measurement.

"topk" is attention over the tiles of the most estimated mass, as the op computes it, estimate and
lists included, "hip" over those that halving chunks finds; "estimate_ms" is what these two take,
"of_dense" their part of the baseline (target: 0.05 at 131,072 tokens). How many tiles are kept does
not depend on the data.

"mass" and "skip" are of queries and keys with structure (`topical`): Gaussian ones keep all tiles
of a part of the mass and leave out none. "mass" is the op under a part of the estimated attention,
capped at 40 % of the tiles; "density" is the part of the pairs that the data then keep. "skip" is
the kernel that leaves out tiles which cannot matter, at limits that leave out as many as it says;
"kernel_ms" is the same kernel without limits, "dense" the library.

"grid" is attention within windows of images and videos, as the op computes it, without causality
and with 16 heads; "kernel_ms" is without the copies into the order of tiles and back. "dilated" is
the same of sequences under plain and dilated windows; "kernel_ms" is without the copies that bring
tokens of equal rest together and back.

"backward" is the gradient of q, k and v by the kernels of kernels/attention_backward/, from what
the forward kept: 5 products where the forward makes 2. "efficiency" is its rate over the
forward's (target: 0.6); for lists, turning them around is part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_cases import (
    BACKENDS,
    DIM,
    HEADS,
    SHARES,
    SINK,
    TOPK_LENGTHS,
    WINDOW,
    Report,
    baseline,
    baselines,
    kept_pairs,
    ms,
    qkv,
    random_lists,
    ratio,
    reporting,
    seconds,
    tflops,
)
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from fxopt.kernels.attention import attention_with_lse
from fxopt.kernels.attention import grid as grids
from fxopt.kernels.attention import skip as skips
from fxopt.kernels.attention.blocks import (
    TileLists,
    block_sparse,
    block_sparse_reference,
    lists_of_grid,
)
from fxopt.kernels.attention.dilated import folded
from fxopt.kernels.attention.op import attention
from fxopt.kernels.attention.spec import Attention, bind, in_order
from fxopt.kernels.attention.triton import attention_forward
from fxopt.kernels.attention_backward.triton import attention_gradients
from fxopt.kernels.block_topk.reference import TILE, chosen_tiles
from fxopt.kernels.block_topk.triton import kept_lists
from fxopt.kernels.hip.reference import chosen_tiles as halved_tiles
from fxopt.kernels.hip.triton import kept_lists as halved_lists
from fxopt.kernels.turned_lists.triton import turned

# Of tokens (a class token, height, width; or frames first), batch, head size.
GRIDS = [
    ((1, 37, 37), 32, 64), ((1, 64, 64), 8, 64), ((1, 128, 128), 1, 64),
    ((0, 16, 48, 48), 1, 128), ((0, 32, 64, 64), 1, 128),
]  # fmt: skip
DENSE_LENGTHS = (4096, 16384, 65536)
WINDOW_TARGETS = {16384: 1.6, 65536: 5.5, 131072: 11.0}
SPARSE_LENGTH, DENSITIES, OVERHEAD_TARGET = 32768, (0.05, 0.1, 0.25, 0.5), 1.6
MASS_LENGTHS, SKIP_LENGTHS = (16384, 65536), (4096, 16384, 65536)
BACKWARD_LENGTHS = (16384, 65536)


SEQUENCES = [(1500, 32), (8192, 4), (32768, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)

    def run(report: Report) -> None:
        for name in args.only:
            STEPS[name](report)

    reporting(args.out, run)


def check(report: Report) -> None:
    """Against float64 with the same masks; the error in units of the plain formula's own."""
    for dim in (64, 128, 256):
        for options in (
            {}, {"window": [300], "sink_tokens": [70]}, {"window": [0, 100]}, {"causal": False},
            {"window": [200], "causal": False}, {"softcap": 20.0}, {"mask": True}, {"sinks": True},
        ):  # fmt: skip
            call = small_call(dim, 1001, 1001, dict(options))
            worst(call, None, report, dim=dim, **{k: str(v) for k, v in options.items()})
        for key_tile in (64, 128):
            call = small_call(dim, 900, 1001, {})
            lists = random_lists(900, 1001, 4, 0.4, key_tile)
            worst(call, lists, report, dim=dim, key_tile=key_tile)
        for options in ({}, {"mask": True}, {"softcap": 20.0}, {"mass": [600, 900]}):
            call = small_call(dim, 3900, 4001, {"top": [150, 400], **options})
            lists = kept_lists(call)
            chosen_alike(call, lists, report, dim=dim, **{k: str(v) for k, v in options.items()})
            worst(replace(call, top=(0, 0), mass=(0, 0)), lists, report, dim=dim, top=True)
            if "mass" in options:
                continue
            call = small_call(dim, 3900, 9001, {"top": [100], "hip": [1], **options})
            lists = halved_lists(call)
            chosen_alike(call, lists, report, dim=dim, **{k: str(v) for k, v in options.items()})
            worst(replace(call, top=(0, 0)), lists, report, dim=dim, hip=True)


def small_call(dim: int, queries: int, keys: int, options: dict[str, Any]) -> Attention:
    q, k, v = qkv(queries, dim, 2, 4, 2, keys)
    if options.pop("mask", False):
        options["mask"] = torch.ones(2, keys, device="cuda")
        options["mask"][0, :77] = 0
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(4, device="cuda")
    given = {
        "mask": None, "bias": None, "sinks": None, "scale": dim**-0.5, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0],
    } | options  # fmt: skip
    return bind(q, k, v, **given)


def chosen_alike(call: Attention, lists: TileLists, report: Report, **line: Any) -> None:
    """How many of the tiles that float64 keeps stand on the lists: all but those at the margin."""
    choose = halved_tiles if any(call.hip) else partial(chosen_tiles, mass=call.mass)
    expected = choose(
        call.q.double(), call.k.double(), call.mask, call.scale, call.softcap, call.top
    ).flatten(1, 2)
    found = torch.zeros(*expected.shape[:3], expected.shape[3] + 1, dtype=torch.bool, device="cuda")
    for count, tiles in (lists.tensors()[:2], lists.tensors()[2:]):
        room = torch.arange(tiles.shape[3], device="cuda") < count[..., None]
        found.scatter_(3, tiles.long().where(room, expected.shape[3]), True)
    found = found[..., :-1]
    agree = float((found & expected).sum() / expected.sum())
    # As many as a share, but for a part of the mass rounding decides at the margin.
    same = any(call.mass) or bool(found.sum(3).equal(expected.sum(3)))
    # Ranges of keys are rounded, products with them are not as exact.
    least = 0.95 if any(call.hip) else 0.98
    report(check=agree > least and same, chosen_as_in_float64=round(agree, 4), **line)
    assert same, line
    assert agree > least, line


def worst(call: Attention, lists: TileLists | None, report: Report, **line: Any) -> None:
    def reference(wide: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (t.double() if wide else t for t in (call.q, call.k, call.v))
        sinks = call.sinks.double() if wide and call.sinks is not None else call.sinks
        arguments = (
            q, k, v, call.mask, None, sinks, call.scale, call.causal,
            call.window, call.softcap, call.sink_tokens,
        )  # fmt: skip
        if lists is None:
            return attention_with_lse(*arguments)
        return block_sparse_reference(bind(*arguments), lists)

    expected, same_dtype, actual = reference(True), reference(False), attention_forward(call, lists)
    error = (actual[0] - expected[0]).abs().max() / (same_dtype[0] - expected[0]).abs().max()
    seen = expected[1] > -torch.inf
    lse_error = (actual[1][seen] - expected[1][seen]).abs().max()
    ok = bool(error < 8 and lse_error < 1e-3 and not actual[0].isnan().any())
    report(check=ok, error=round(float(error), 2), lse_error=float(lse_error), **line)
    assert ok, line


def dense(report: Report) -> None:
    """Our kernel without any mask but causality, where the op would take the library's."""
    for length in DENSE_LENGTHS:
        call = bind(*qkv(length), None, None, None, DIM**-0.5, True, [0], 0.0, [0])
        ours = seconds(lambda call=call: attention_forward(call))
        line = {"ms": ms(ours), "tflops": tflops(length, ours), "speedup": ratio(length, ours)}
        report(case="dense", length=length, **baselines(length), **line)


def windowed(report: Report) -> None:
    """The op under a window with sink tokens."""
    for length, target in WINDOW_TARGETS.items():
        q, k, v = qkv(length)
        ours = seconds(
            lambda q=q, k=k, v=v: attention(
                q, k, v, None, None, None, DIM**-0.5, True, [WINDOW], 0.0, [SINK]
            )
        )
        pairs = length * (SINK + WINDOW) - (SINK + WINDOW) ** 2 / 2
        rate = round(4e-12 * HEADS * DIM * pairs / ours)
        report(
            case=f"sink {SINK} + window {WINDOW}", length=length, **baselines(length),
            ms=ms(ours), tflops=rate, speedup=ratio(length, ours), target=target,
        )  # fmt: skip


def sparse(report: Report) -> None:
    """Random tiles, drawn for each head."""
    length = SPARSE_LENGTH
    q, k, v = qkv(length)
    report(case="dense", length=length, **baselines(length))
    for key_tile in (128, 64):
        for density in DENSITIES:
            lists = random_lists(length, length, HEADS, density, key_tile)
            ours = seconds(
                lambda lists=lists: block_sparse(q, k, v, lists, scale=DIM**-0.5, causal=True)
            )
            kept = kept_pairs(lists)
            report(
                case=f"random 128x{key_tile} tiles", length=length, density=round(kept, 4),
                ms=ms(ours), tflops=round(tflops(length, ours) * kept),
                speedup=ratio(length, ours), target=OVERHEAD_TARGET,
                overhead=round(ours / kept / baseline(length), 2),
            )  # fmt: skip


def topk(report: Report) -> None:
    """The op under shares of tiles, and what choosing them takes."""
    timed_shares("top", 0, kept_lists, report)


def hip(report: Report) -> None:
    """The same where chunks of keys are halved."""
    timed_shares("hip", 1, halved_lists, report)


def timed_shares(
    name: str, hip: int, find: Callable[[Attention], TileLists], report: Report
) -> None:
    for length in TOPK_LENGTHS:
        q, k, v = qkv(length)
        report(case="dense", length=length, **baselines(length))
        for share in SHARES:
            options = (
                None, None, None, DIM**-0.5, True, [0], 0.0, [0], [share], [0], [], [0], [1], [hip],
            )  # fmt: skip
            call = bind(q, k, v, *options)
            lists = find(call)
            choosing = seconds(lambda call=call: find(call))
            ours = seconds(lambda q=q, k=k, v=v, o=options: attention(q, k, v, *o))
            kept = kept_pairs(lists)
            report(
                case=f"{name} {share / 10:g} % of tiles of {TILE}", length=length,
                density=round(kept, 4), ms=ms(ours), estimate_ms=ms(choosing),
                of_dense=round(choosing / baseline(length), 4), speedup=ratio(length, ours),
                overhead=round((ours - choosing) / kept / baseline(length), 2),
            )  # fmt: skip


def masses(report: Report) -> None:
    """The op where each head keeps tiles of a part of its attention."""
    for length in MASS_LENGTHS:
        q, k, v = topical(length)
        report(case="dense", length=length, **baselines(length))
        for options in (([400], 950), ([400], 900), ([200], 0)):
            top, part = options
            given = (
                None, None, None, DIM**-0.5, True, [0], 0.0, [0], top, [0], [], [0], [1], [0],
                [part],
            )  # fmt: skip
            call = bind(q, k, v, *given)
            lists = kept_lists(call)
            kept = kept_pairs(lists)
            choosing = seconds(partial(kept_lists, call))
            ours = seconds(partial(attention, q, k, v, *given))
            report(
                case=f"mass {part / 10:g} %" if part else f"top {top[0] / 10:g} %", length=length,
                density=round(kept, 4), ms=ms(ours), estimate_ms=ms(choosing),
                speedup=ratio(length, ours),
                overhead=round((ours - choosing) / kept / baseline(length), 2),
            )  # fmt: skip


def skipped(report: Report) -> None:
    """The kernel that leaves out tiles, at limits of a nat and more, and how many these are."""
    for length in SKIP_LENGTHS:
        q, k, v = topical(length)
        plain = bind(q, k, v, None, None, None, DIM**-0.5, True, [0], 0.0, [0])
        alone = seconds(partial(attention_forward, plain))
        report(case="dense", length=length, kernel_ms=ms(alone), **baselines(length))
        exact = attention_forward(plain)[0].float()
        for nats in (100.0, 8.0, 4.0, 2.0, 1.0):
            call = replace(plain, skip=(int(100 * nats),) * HEADS)
            ours = seconds(partial(attention_forward, call))
            error = (attention_forward(call)[0].float() - exact).norm() / exact.norm()
            report(
                case=f"skip {nats:g} nats", length=length, ms=ms(ours), kernel_ms=ms(alone),
                left_out=round(_left_out(call), 4), error=float(error),
                of_kernel=round(ours / alone, 3), speedup=ratio(length, ours),
            )  # fmt: skip


def topical(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stretches of 256 tokens have one of 64 topics; queries look for their own, and a query head
    the more sharply the higher its number."""
    q, k, v = qkv(length)
    topics = torch.randint(0, 64, (-(-length // 256),), device="cuda")
    words = torch.randn(64, DIM, device="cuda")[topics].repeat_interleave(256, 0)[:length]
    sharp = torch.linspace(0.1, 1.0, HEADS, device="cuda")[:, None, None]
    return (0.5 * q + sharp * words).bfloat16(), (0.5 * k + words).bfloat16(), v


def _left_out(call: Attention) -> float:
    """Of the tiles of every 16th query tile of every 4th head."""
    out = every = 0
    for start in range(0, call.q.shape[2], 16 * skips.QUERY_TILE):
        rows = torch.arange(start, start + skips.QUERY_TILE, device="cuda")
        for head in range(0, HEADS, 4):
            q = call.q[:, head : head + 1, rows].float() * call.scale
            scores = q @ call.k[:, head // call.group_size, None].float().mT
            hidden = torch.arange(scores.shape[3], device="cuda") > rows[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
            gap, may = skips.gaps(scores, rows, call.k.shape[2], None, None, None)
            out += int((may & (gap > skips.UNIT * call.skip[head])).sum())
            every += -(-(start + skips.QUERY_TILE) // skips.KEY_TILE)
    return out / every


def windows_of_grids(report: Report) -> None:
    """The op under windows along each axis, and its kernel alone."""
    for grid, batch, dim in GRIDS:
        q, k, v = qkv(grids.tokens(grid), dim, batch, 16, 16)
        dense = min(seconds(partial(_dense, name, q, k, v)) for name in BACKENDS)
        edge = grids.edge(grid)
        space: list[grids.Dilation] = [(1, d, d) for d in (2, 4) if len(grid) == 4]
        for near, dilation in (
            (4, 1), (8, 1), (16, 1), (32, 1), *((edge, d) for d in (2, 4, *space)),
        ):  # fmt: skip
            part = grids.density(grid, near, dilation)
            if part > 0.6:
                continue
            options = (
                None, None, None, dim**-0.5, False, [0], 0.0, [0], [0], [0], list(grid), [near],
                grids.listed([dilation] * 16, grid),
            )  # fmt: skip
            ours = seconds(partial(attention, q, k, v, *options))
            call = in_order(bind(q, k, v, *options))
            lists = lists_of_grid(grid, call.near, dilation, q.device)
            report(
                case="grid", grid=grid, batch=batch, dim=dim, near=near, dilation=dilation,
                density=round(part, 4), dense_ms=ms(dense), ms=ms(ours),
                kernel_ms=ms(seconds(partial(attention_forward, call, lists))),
                speedup=round(dense / ours, 2), overhead=round(ours / part / dense, 2),
            )  # fmt: skip


def windows_of_sequences(report: Report) -> None:
    """The op under windows that reach to both sides, and its kernel alone."""
    for length, batch in SEQUENCES:
        q, k, v = qkv(length, 64, batch, 16, 16)
        dense = min(seconds(partial(_dense, name, q, k, v)) for name in BACKENDS)
        for window, dilation in ((256, 1), (256, 2), (256, 4), (512, 1), (1024, 1)):
            if 2 * window >= length // dilation:
                continue
            none = (None, None, None, 64**-0.5, False)
            options = (*none, [window], 0.0, [0], [0], [0], [], [0], [dilation])
            ours = seconds(partial(attention, q, k, v, *options))
            call = bind(q, k, v, *options)
            call = folded(call) if dilation > 1 else call
            report(
                case="dilated", length=length, batch=batch, window=window, dilation=dilation,
                dense_ms=ms(dense), ms=ms(ours),
                kernel_ms=ms(seconds(partial(attention_forward, call, None))),
                speedup=round(dense / ours, 2),
            )  # fmt: skip


def _dense(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v)


def backward(report: Report) -> None:
    """Gradients under a window with sink tokens, under lists, and under causality alone."""
    window = {"window": [WINDOW], "sink_tokens": [SINK]}
    for length in BACKWARD_LENGTHS:
        timed_backward(length, f"sink {SINK} + window {WINDOW}", None, window, report)
    length = BACKWARD_LENGTHS[0]
    lists = random_lists(length, length, HEADS, 0.25, 128)
    timed_backward(length, "random 128x128 tiles", lists, {}, report)
    timed_backward(length, "causal", None, {}, report)


def timed_backward(
    length: int, case: str, lists: TileLists | None, options: dict[str, Any], report: Report
) -> None:
    q, k, v = qkv(length)
    given = {"window": [0], "softcap": 0.0, "sink_tokens": [0]} | options
    call = bind(q, k, v, None, None, None, DIM**-0.5, True, **given)
    out, lse = attention_forward(call, lists)
    gradient = torch.randn_like(out)
    forward = seconds(lambda: attention_forward(call, lists))
    ours = seconds(lambda: attention_gradients(gradient, out, lse, call, lists))
    line: dict[str, Any] = {}
    pairs = length * length / 2
    if lists is not None:
        pairs *= kept_pairs(lists)
        line["turning_ms"] = ms(seconds(lambda: turned(lists, length)))
    elif given["window"][0]:
        pairs = length * (SINK + WINDOW) - (SINK + WINDOW) ** 2 / 2
    rate = 4e-12 * HEADS * DIM * pairs / forward
    back = 10e-12 * HEADS * DIM * pairs / ours
    report(
        case=case, length=length, forward_ms=ms(forward), backward_ms=ms(ours),
        forward_tflops=round(rate), backward_tflops=round(back),
        efficiency=round(back / rate, 3), target=0.6, **line,
    )  # fmt: skip


STEPS: dict[str, Callable[[Report], None]] = {
    "check": check, "dense": dense, "window": windowed, "sparse": sparse, "topk": topk, "hip": hip,
    "mass": masses, "skip": skipped, "grid": windows_of_grids, "dilated": windows_of_sequences,
    "backward": backward,
}  # fmt: skip

if __name__ == "__main__":
    main()
