"""Decoding of codes on tensor cores: near to float64 over the same stored bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_attention import allocate, parse
from fxopt.kernels.kv_attention.device import ranks
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.layout import Blocks, split_state
from fxopt.kernels.kv_attention.mutating import (
    attend_image,
    blocks_used,
    cached_attention_mutating,
)
from fxopt.kernels.kv_int8 import launch
from fxopt.kernels.kv_int8.triton import decode_packed, serves
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORIGIN = torch.zeros((), dtype=torch.int64)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def filled(
    layout: str, kv: int, dims: tuple[int, int], length: int, crop: int = 0, scale: float = 1.0
) -> tuple[dict[str, Tensor], Blocks]:
    """A cache of `length` tokens, from which `crop` more were taken away."""
    fmt = parse(layout).classes[0].format
    assert fmt is not None
    whole = length + crop
    state = allocate(parse(layout), 1, kv, *dims, whole + 200, torch.float32, DEVICE)
    x = (
        draw(1, kv, whole, dims[0]),
        scale * draw(1, kv, whole, dims[0]),
        draw(1, kv, whole, dims[1]),
    )
    start = ORIGIN.to(DEVICE)
    cached_attention_mutating(*x, state, start, None, None, None, 1.0, True, [0], 0.0, [0], layout)
    if crop:
        state[0].clamp_(max=length - fmt.sink)
    return split_state(parse(layout), kv, state)[0][2], fmt


def soil(part: dict[str, Tensor]) -> None:
    """Fill what no block in use holds with numbers that show wherever they are read."""
    used = blocks_used(part)
    for x in (x for x in part.values() if x.dim() == 5):
        unused = x[:, :, used:]
        if x.is_floating_point() and x.itemsize > 1:
            unused.fill_(torch.nan)
        else:
            unused.view(torch.uint8).fill_(0x7F)


def error(
    layout: str, group: int, dims: tuple[int, int], length: int, *, kv: int = 1, queries: int = 1,
    hidden: int = 0, window: int = 0, softcap: float = 0.0, crop: int = 0, splits: int | None = 3,
    scale: float = 1.0, sinks: Tensor | None = None, sink_tokens: int = 2, exact: int | None = None,
) -> float:  # fmt: skip
    """Of the kernel, relative to float64 over the dequantised cache."""
    part, fmt = filled(layout, kv, dims, length, crop, scale)
    new = {"key": draw(1, kv, queries, dims[0]), "value": draw(1, kv, queries, dims[1])}
    q = 2 * draw(1, kv * group, queries, dims[0])
    rest: Any = (sinks, dims[0] ** -0.5, True, [window], softcap, [sink_tokens])
    mask = torch.ones(1, length + queries, dtype=torch.long, device=DEVICE)
    mask[:, :hidden] = 0
    arguments = Arguments(q, None, *rest)
    assert serves(arguments, new, part, fmt)
    if splits is None:
        soil(part)
    rank = ranks(mask) if hidden else None
    start = torch.tensor(length, device=DEVICE)
    out = decode_packed(arguments, new, part, start, rank, fmt, splits, exact_shares=exact).joined()
    wide = Arguments(q.double(), None, *rest)
    stored = {
        n: t.double() if t.is_floating_point() and t.itemsize > 1 else t for n, t in part.items()
    }
    fresh = {n: t.double() for n, t in new.items()}
    exact = attend_image(attention_reference, wide, fresh, stored, mask, fmt, length)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("layout", "group", "dims", "length", "changes"),
    [
        ("k4v4g128r0s0", 4, (128, 128), 273, {}),
        ("k2v2g128r8s4", 4, (128, 64), 301, {"splits": 5}),
        ("k8v8g32r8s0", 1, (64, 64), 205, {"kv": 2, "splits": 1}),
        ("k8v4g64r8s4", 8, (64, 64), 301, {"sinks": torch.linspace(-1, 1, 8)}),
        ("k4v2g128r8s4", 4, (64, 64), 301, {"queries": 3, "hidden": 37}),
        ("k4v8g64r8s4", 3, (128, 64), 301, {"window": 100}),
        ("k4v4g64r8s4", 3, (64, 64), 450, {"window": 70, "sink_tokens": 90}),
        ("k4v4g64r8s4", 3, (64, 64), 450, {"window": 70, "hidden": 130}),
        ("k4v4g64r8s0", 2, (64, 64), 420, {"window": 30, "sink_tokens": 100, "crop": 345}),
        ("k4v8g32r8s4", 16, (64, 64), 301, {"softcap": 3.0, "hidden": 150}),
        ("kf8vf8g64r8s4", 3, (128, 64), 301, {"window": 100, "queries": 2}),
        ("kf8v4g64r8s4", 8, (64, 64), 301, {"hidden": 37}),
        ("k8vf8g32r8s0", 2, (64, 64), 205, {"softcap": 3.0, "splits": 1}),
        ("k4v4g64r0s4", 3, (64, 64), 241, {"crop": 100}),
        ("k4v4g64r64s4", 2, (64, 64), 60, {}),
        ("k4v4g64r64s4", 2, (64, 64), 195, {"exact": 1}),
        ("k4v4g64r64s4", 2, (64, 64), 195, {"exact": 2, "queries": 3}),
        ("k4v4g64r64s4", 4, (64, 64), 195, {"exact": 3, "window": 70}),
        ("k4v4g64r64s0", 2, (64, 64), 190, {"exact": 7, "hidden": 100}),
        # a program for each block of the room, in use or not
        ("k4v4g64r8s4", 4, (64, 64), 301, {"splits": None}),
        ("k8v4g128r8s4", 2, (128, 64), 301, {"splits": None, "hidden": 37, "softcap": 3.0}),
        ("k8v8g32r8s0", 1, (64, 64), 125, {"splits": None, "kv": 2, "crop": 50}),
        ("kf8vf8g64r8s4", 2, (64, 64), 205, {"splits": None, "queries": 2}),
        ("k4v4g64r64s4", 2, (64, 64), 60, {"splits": None}),
        ("k4v4g64r8s4", 3, (64, 64), 301, {"splits": None, "window": 100}),
    ],
)
def test_near_float64(
    layout: str, group: int, dims: tuple[int, int], length: int, changes: dict[str, Any]
) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    assert error(layout, group, dims, length, **moved) < 5e-4


def test_keys_of_any_magnitude() -> None:
    for scale in (1e-20, 0.0):
        assert error("k4v4g64r0s0", 2, (64, 64), 129, scale=scale) < 5e-4


def test_what_it_serves() -> None:
    part, fmt = filled("k4v4g64r0s0", 1, (64, 64), 70)
    new = {side: draw(1, 1, 1, 64) for side in ("key", "value")}

    def answer(rows: int = 4, bias: Tensor | None = None, layout: str = str(fmt)) -> bool:
        chosen = parse(layout).classes[0].format
        assert chosen is not None
        q = draw(1, rows, 1, 64)
        arguments = Arguments(q, bias, None, 0.125, True, [0], 0.0, [0])
        return serves(arguments, new, part, chosen)

    assert answer()
    assert not answer(rows=17)
    assert not answer(bias=draw(1, 1, 1, 71))
    assert not answer(layout="k16v4g64r0s0")
    assert not answer(layout="k2v4g64r0s0")
    assert not answer(layout="k4v2g64r0s0")


@pytest.mark.parametrize(
    ("heads", "blocks", "at_once", "splits"),
    [
        (128, 258, 6, 5),  # all at a time
        (8, 1026, 6, 66),  # four programs a processor
        (8, 34, 6, 34),  # a block each
        (512, 66, 6, 3),  # two waves
        (128, 258, 3, 3),  # one, but for the exact share
        (8000, 258, 3, 1),
        (1, 5000, 8, 127),
    ],
)
def test_shares_fill_an_h100(heads: int, blocks: int, at_once: int, splits: int) -> None:
    assert launch.splits(heads, blocks, at_once, 132) == splits


@pytest.mark.parametrize(
    ("bits", "heads", "blocks", "rows", "few"),
    [
        ("k4v4", 8, 17, 4, True),  # 2,048 tokens and room for 256
        ("k8v8", 8, 33, 4, True),
        ("k4v4", 8, 34, 4, False),  # more than was measured
        ("k4v4", 16, 17, 4, False),
        ("k4v4", 8, 17, 5, False),  # tiles that another instruction would multiply
        ("k4v2", 8, 17, 4, False),
        ("kf8vf8", 1, 250, 1, True),
    ],
)
def test_few_blocks(bits: str, heads: int, blocks: int, rows: int, few: bool) -> None:
    fmt = parse(f"{bits}g128r64s4").classes[0].format
    assert fmt is not None
    assert launch.few(fmt, heads, blocks, rows, 132) is few


@pytest.mark.parametrize(
    ("tiles", "blocks", "splits", "places", "shares"),
    [
        (6, 15, 15, 99, 4),  # a block each: the exact tokens would take longest
        (6, 258, 5, 6, 1),  # many blocks each
        (2, 15, 15, 99, 2),
        (6, 5, 5, 7, 2),  # as many as run at a time
        (6, 3, 3, 1, 1),
        (0, 15, 15, 99, 1),
    ],
)
def test_shares_of_what_is_exact(
    tiles: int, blocks: int, splits: int, places: int, shares: int
) -> None:
    assert launch.exact_shares(tiles, blocks, splits, places) == shares


COMPILE = """
from fxopt.kernels.kv_int8.triton import _decode_packed_kernel as kernel
from tests.kernels.ahead_of_time import build

p, long, stored, wide = "*bf16", "*i64", STORED, "*fp32"
kinds = dict(
    q=p, k=p, v=p, start_ptr=long, block_start=long, sink_k=p, sink_v=p, key=stored, key_scale=p,
    key_zero=p, value=stored, value_scale=p, value_zero=p, recent_k=p, recent_v=p, rank="*i32",
    windows=long, listed="*i32", listed_count="*i32", out=wide, out_m=wide, out_l=wide, counts=long,
    scale="fp32", softcap="fp32",
)
constants = dict(
    N=1, G=4, D=128, DV=128, GROUP=128, SINK=4, K_BITS=BITS[0], V_BITS=BITS[1], CAUSAL=True,
    HAS_RANK=False, HAS_WINDOW=False, HAS_SOFTCAP=False, UPCAST=False, ASM=True, R=4,
    TILE=64 if ONE_BLOCK else 16, EXACT=2, HAS_LIST=LISTED, OVERLAP=True, ONE=ONE_BLOCK, table=None,
)
options = {"num_warps": 4 if ONE_BLOCK else 1, "num_stages": 1 if ONE_BLOCK else 3}
text = build(kernel, kinds, kinds, options=options, **constants).asm["ptx"]
assert PRODUCT in text
assert ("cvt.rn.f16x2.e4m3x2" in text) == ("fp8" in stored)
assert ("cp.async.cg.shared.global" in text) is not ONE_BLOCK
assert "wgmma" not in text
"""


INT8 = {
    "STORED": "*u8",
    "BITS": (4, 2),
    "PRODUCT": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8",
}
FLOAT8 = {
    "STORED": "*fp8e4nv",
    "BITS": (8, 8),
    "PRODUCT": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16",
}


@pytest.mark.parametrize(("listed", "one"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("kind", [INT8, pytest.param(FLOAT8, marks=pytest.mark.slow)])
def test_compiled_for_hopper_it_prefetches_and_multiplies_codes(
    listed: bool, one: bool, kind: Any
) -> None:
    names = {**kind, "LISTED": listed, "ONE_BLOCK": one}
    given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    compiled(f"{given}\n{COMPILE}")
