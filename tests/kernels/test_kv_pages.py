"""Packed blocks on pages: what a block table changes is where they lie, and no bit of what is
computed. Kernels are interpreted on a CPU and compiled for sm_90."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_attention import allocate, cached_attention, parse
from fxopt.kernels.kv_attention.layout import layout_shapes, split_state
from fxopt.kernels.kv_attention.mutating import blocks_used, cached_attention_mutating
from fxopt.kernels.kv_attention.op import store_first
from fxopt.kernels.kv_attention.pages import HIDDEN, lines, stored
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KV, GROUP = 2, 3
LAYOUTS = [
    "k4v2g32r8s4",
    "k2v8g32r0s0",
    "kf8vf8g32r5s3",
    "k8vf8g32r8s4",
    "k16v4g32r3s0",
    "0:k8v2g32r5s1|1:exact",
    "1:k4v16g32r5s3|0:k16v2g64r40s4",
    "k4v4g32r8s4+t64",
    "0:kf8v4g32r40s2+t96|1:exact+t96",
]
Part = dict[str, Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def pair(
    layout: str, dims: tuple[int, int], capacity: int, batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Two empty states: blocks side by side, and on pages in no order with NaN around them."""
    sizes = (parse(layout), batch, KV, *dims, capacity, dtype, DEVICE)
    paged = allocate(*sizes, pool_tokens=batch * capacity)
    for _, fmt, part in split_state(parse(layout), KV, paged):
        if fmt is None:
            continue
        for name, x in part.items():
            if x.dim() == 5:
                part[name].copy_(torch.full(x.shape, 113.0 if x.itemsize == 1 else torch.nan))
        places = part["table"].numel()
        pages = 1 + torch.randperm(len(part["key"]) - 1)[:places]
        part["table"].copy_(pages.view_as(part["table"]))
    return allocate(*sizes), paged


def numbers(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def assert_same(layout: str, states: Sequence[list[Tensor]]) -> None:
    """Every stored number, to the bit."""
    classes = [split_state(parse(layout), KV, state) for state in states]
    for (_, fmt, one), (_, _, other) in zip(*classes, strict=True):
        names = [name for name, x in one.items() if x.dim() == 5]
        if fmt is not None:
            assert blocks_used(one) == blocks_used(other)
            blocks = [stored(part, names, blocks_used(one)) for part in (one, other)]
            for name in names:
                assert torch.equal(*(numbers(part[name]) for part in blocks))
        for name in set(one) - set(names):
            assert torch.equal(one[name], other[name])


def steps(
    layout: str, dims: tuple[int, int], chunks: list[int], padded: bool,
    kernels: Any = None, crops: dict[int, int] | None = None, dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> int:  # fmt: skip
    """Each call over both states; how many blocks were in use. Before the call of an index in
    `crops` so many tokens are taken away."""
    total, crops = sum(chunks), crops or {}
    sizes = ((KV * GROUP, dims[0]), (KV, dims[0]), (KV, dims[1]))
    x = [draw(2, heads, total, dim, dtype=dtype) for heads, dim in sizes]
    mask = torch.ones(2, total, dtype=torch.long, device=DEVICE)
    mask[1, :41] = 0
    states = pair(layout, dims, total + 32 * len(crops), dtype=dtype)
    options: dict[str, Any] = {
        "bias": None, "sinks": None, "scale": 0.3, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0], **changes,
    }  # fmt: skip
    done = 0
    for index, count in enumerate(chunks):
        if index in crops:
            done -= crops[index]
            for state in states:
                for _, fmt, part in split_state(parse(layout), KV, state):
                    if fmt is not None:
                        part["block_start"].clamp_(max=max(0, done - fmt.sink))
        new = [t[:, :, done : done + count].contiguous() for t in x]
        seen = mask[:, : done + count] if padded else None
        start = torch.tensor(done, device=DEVICE)
        outputs = [
            cached_attention_mutating(
                *new, state, start, seen, **options, layout=layout, kernels=kernels
            )
            for state in states
        ]
        assert torch.equal(*outputs)
        assert outputs[0].isfinite().all()
        done += count
        assert_same(layout, states)
    parts = split_state(parse(layout), KV, states[1])
    return max(blocks_used(part) for _, fmt, part in parts if fmt)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_reads_and_writes_through_the_table(layout: str, padded: bool) -> None:
    chunks = [2, 130, 1, 1, 3, 20, 1, 40, 1]
    assert steps(layout, (16, 8), chunks, padded, dtype=torch.float64) >= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_blocks_of_a_crop(layout: str) -> None:
    assert steps(layout, (16, 8), [150, 1, 60, 1, 1], True, crops={2: 57, 3: 11}) >= 2


CASES: list[tuple[str, tuple[int, int], bool, dict[str, Any]]] = [
    ("k4v2g32r8s4", (16, 8), True, {"window": [29], "sink_tokens": [3], "softcap": 2.0}),
    ("k16v4g32r3s0", (5, 12), False, {}),
    ("0:k8v2g32r5s1|1:exact", (24, 8), True, {}),
    ("kf8vf8g32r5s3", (10, 6), False, {}),
    ("k4v4g32r8s4+t64", (16, 8), True, {}),
    # of sizes that the kernel of the tensor cores serves
    ("k4v4g64r8s4", (64, 64), True, {}),
    ("k8v4g64r8s0", (64, 64), False, {"window": [70], "sink_tokens": [5]}),
    ("k8vf8g32r0s0", (64, 64), False, {}),
    ("0:k4v8g64r8s4+t128|1:kf8vf8g32r5s3+t64", (64, 64), True, {}),
]


@pytest.mark.parametrize(("layout", "dims", "padded", "changes"), CASES)
def test_kernels_read_and_write_through_the_table(
    layout: str, dims: tuple[int, int], padded: bool, changes: dict[str, Any]
) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.kv_attention.device import attend_and_append

    kernels = partial(attend_and_append, attention_reference)
    chunks = [230, 1, 3, 1, 31, 1] if dims[0] == 64 else [130, 1, 3, 1, 31, 1]
    assert steps(layout, dims, chunks, padded, kernels, {4: 20}, **changes) >= 2


@pytest.mark.parametrize("layout", ["k4v2g32r8s4", "kf8vf8g32r5s3+t64"])
def test_rows_may_share_pages(layout: str) -> None:
    """Rows of one prompt that go on apart."""
    prompt = [draw(1, heads, 140, dim) for heads, dim in ((KV * GROUP, 16), (KV, 16), (KV, 8))]
    apart, shared = pair(layout, (16, 8), 200)
    (_, _, part), = split_state(parse(layout), KV, shared)  # fmt: skip
    part["table"][1, :4] = part["table"][0, :4]
    options = (None, None, None, 0.3, True, [0], 0.0, [0], layout)
    done = torch.tensor(0, device=DEVICE)
    for count in (140, 1, 30, 1):
        new = [draw(2, x.shape[1], count, x.shape[3]) for x in prompt]
        if count == 140:
            new = [x.expand(2, -1, -1, -1).contiguous() for x in prompt]
        outputs = [cached_attention(*new, state, done, *options) for state in (apart, shared)]
        assert torch.equal(*outputs)
        done += count
    assert_same(layout, (apart, shared))
    assert len(part["table"][:, :4].unique()) == 4


def test_blocks_of_padding_may_share_a_page() -> None:
    layout = "k4v2g32r8s4"
    x = [draw(2, heads, 150, dim) for heads, dim in ((KV * GROUP, 16), (KV, 16), (KV, 8))]
    mask = torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    mask[1, :103] = 0
    apart, shared = pair(layout, (16, 8), 150)
    (_, _, part), = split_state(parse(layout), KV, shared)  # fmt: skip
    part["table"][1, :3] = HIDDEN
    for low, high in ((0, 140), (140, 149), (149, 150)):
        new, start = [t[:, :, low:high] for t in x], torch.tensor(low, device=DEVICE)
        options = (mask[:, :high], None, None, 0.3, True, [0], 0.0, [0], layout)
        out, other = (cached_attention(*new, state, start, *options) for state in (apart, shared))
        assert torch.equal(out, other)
    assert not part["key"][HIDDEN].any()


def test_a_first_fill_goes_to_its_pages() -> None:
    layout = "kf8v2g32r5s3"
    fmt = parse(layout).classes[0].format
    states = pair(layout, (16, 8), 120)
    new = {"key": draw(2, KV, 111, 16), "value": draw(2, KV, 111, 8)}
    for state in states:
        (_, _, part), = split_state(parse(layout), KV, state)  # fmt: skip
        store_first(part, new, torch.tensor(0, device=DEVICE), fmt)
    assert_same(layout, states)
    assert blocks_used(part) == 3


def test_lines_are_where_blocks_lie() -> None:
    for state in pair("k4v4g32r0s0", (8, 8), 160):
        (_, _, part), = split_state(parse("k4v4g32r0s0"), KV, state)  # fmt: skip
        x = part["key_scale"]
        x.copy_(torch.randn(x.shape))
        blocks = stored(part, ("key_scale",), 5)["key_scale"]
        places = torch.stack([torch.randperm(5)[:3] for _ in range(4)]).view(2, KV, 3).to(DEVICE)
        found = x.flatten(0, 2)[lines(part, "key_scale", places)]
        for b, h, i in ((0, 0, 1), (1, 0, 2), (1, 1, 0), (0, 1, 2)):
            assert torch.equal(found[b, h, i], blocks[b, h, places[b, h, i]])


def test_sizes_of_a_pool() -> None:
    layout = parse("0:k4v4g64r70s4|1:exact")
    packed, exact = layout_shapes(layout, 3, KV, 16, 8, 500, torch.float32, 700)
    assert packed["table"] == ((3, 6), torch.int32)
    # Ten blocks, one of fewer tokens for each row, one of padding.
    assert packed["key"] == ((14, 1, 1, 64, 8), torch.uint8)
    assert packed["value_scale"] == ((14, 1, 1, 64, 1), torch.bfloat16)
    assert packed["recent_key"][0] == (3, 1, 133, 16)
    assert exact["key"][0] == (3, 1, 500, 16)
    with pytest.raises(ValueError, match="got 10; one of pages has a table more for each"):
        split_state(parse("k4v4g64r70s4"), KV, [torch.zeros(1)] * 10)


def test_no_room_in_the_table_is_an_error() -> None:
    layout = "k4v4g32r8s4"
    _, state = pair(layout, (16, 8), 70)
    x = [draw(2, heads, 120, dim) for heads, dim in ((KV * GROUP, 16), (KV, 16), (KV, 8))]
    with pytest.raises(ValueError, match=r"120 are needed; call cache\.reserve\(120\)"):
        cached_attention_mutating(
            *x,
            state,
            torch.tensor(0, device=DEVICE),
            None,
            None,
            None,
            0.3,
            True,
            [0],
            0.0,
            [0],
            layout,
        )


COMPILE = """
from fxopt.kernels.decode_topk.triton import _estimate_kernel
from fxopt.kernels.kv_append.triton import _finish_kernel, _pack_kernel
from fxopt.kernels.kv_attention.triton import _decode_kernel
from fxopt.kernels.kv_int8.triton import _decode_packed_kernel
from tests.kernels.ahead_of_time import build

p, long, ints, wide = "*bf16", "*i64", "*i32", "*fp32"
kinds = dict(
    q=p, k=p, v=p, start_ptr=long, block_start=long, sink_k=p, sink_v=p, table=ints, key_scale=p,
    key_zero=p, value_scale=p, value_zero=p, recent_k=p, recent_v=p, rank=ints, bias=p,
    windows=long, listed=ints, listed_count=ints, out=wide, out_m=wide, out_l=wide, counts=long,
    low=p, high=p, chosen_at=ints, partial=wide, top=wide, total=wide, sinks=p, scale="fp32",
    softcap="fp32", least="fp32", width="fp32",
)

def stored_as(kernel, stored, num_warps=4, **constants):
    pointers = dict(kinds, key=stored, value=stored)
    options = {"num_warps": num_warps, "num_stages": 3}
    return build(kernel, pointers, pointers, options=options, **constants)

shape = dict(D=128, DV=128, GROUP=128, SINK=4, HAS_RANK=True)
def packed(stored, bits, listed, **constants):
    side = dict(shape, K_BITS=bits, V_BITS=bits, CAUSAL=True, HAS_WINDOW=False, HAS_SOFTCAP=False)
    return stored_as(
        _decode_packed_kernel, stored, 2 if bits == 8 else 1, N=1, G=4, UPCAST=False, ASM=True,
        R=4, TILE=16, EXACT=2, HAS_LIST=listed, OVERLAP=True, ONE=False, **side, **constants,
    )

assert "cp.async.cg.shared.global" in packed("*u8", 4, True).asm["ptx"]
for stored in ("*u8", "*fp8e4nv"):
    # Blocks are loaded as far ahead of their products as without a table or a list.
    alone = {"table": None}
    kinds_of = ((False, alone), (False, {}), (True, alone))
    shared = [packed(stored, 8, listed, **given).metadata.shared for listed, given in kinds_of]
    assert len(set(shared)) == 1, shared
for stored, bits in (("*u8", 2), ("*fp8e4nv", 8)):
    side = dict(shape, K_BITS=bits, V_BITS=bits)
    stored_as(
        _decode_kernel, stored, G=4, CAUSAL=True, HAS_BIAS=True, HAS_WINDOW=True, HAS_SOFTCAP=True,
        UPCAST=False, BLOCK_M=16, BLOCK_D=128, BLOCK_V=128, BLOCK_T=128, HAS_LIST=False,
        OVERLAP=True, **side,
    )
    stored_as(_pack_kernel, stored, BLOCK_K=128 * bits // 8, BLOCK_V=128, **side)
    stored_as(
        _finish_kernel, stored, BLOCK_K=128 * bits // 8, BLOCK_T=16, BLOCK_D=128, BLOCK_W=128,
        BLOCK=512, BLOCK_S=64, BLOCK_V=128, G=4, EXACT=False, WAITS=True, **side,
    )
stored_as(_estimate_kernel, "*u8", G=4, D=128, GROUP=64, BLOCK_D=128, BLOCK_T=32)
"""


@pytest.mark.slow
def test_compiles_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    compiled(COMPILE)
