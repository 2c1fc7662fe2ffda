"""Triton kernels of the packed cache: interpreted on a CPU, on the device where there is one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_append.triton import _finish_kernel
from fxopt.kernels.kv_attention import allocate, cached_attention, parse
from fxopt.kernels.kv_attention.device import attend_and_append, ranks
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.layout import split_state
from fxopt.kernels.kv_attention.mutating import attend_image, cached_attention_mutating
from fxopt.kernels.kv_attention.triton import decode
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KV, GROUP = 2, 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": [29], "sink_tokens": [3], "softcap": 2.0},
    "by head": {"window": [0, 17], "sink_tokens": [0, 2], "sinks": torch.linspace(-1, 1, 6)},
    "bias": {"bias": torch.linspace(-1, 1, 6 * 130).view(1, 6, 1, 130)},
}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def steps(
    layout: str, dims: tuple[int, int], chunks: list[int], padded: bool, close: float = 3e-6,
    **changes: Any,
) -> None:  # fmt: skip
    """Every call on kernels and reference: outputs close, states equal to the bit."""
    total = sum(chunks)
    x = (
        draw(2, KV * GROUP, total, dims[0]),
        draw(2, KV, total, dims[0]),
        draw(2, KV, total, dims[1]),
    )
    mask = torch.ones(2, total, dtype=torch.long, device=DEVICE)
    mask[1, :11] = 0
    ours = allocate(parse(layout), 2, KV, *dims, total, torch.float32, DEVICE)
    theirs = allocate(parse(layout), 2, KV, *dims, total, torch.float32)
    start = torch.zeros((), dtype=torch.int64)
    options: dict[str, Any] = {
        "bias": None, "sinks": None, "scale": 0.25, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0], **changes,
    }  # fmt: skip
    for count in chunks:
        done = int(start)
        new = [t[:, :, done : done + count] for t in x]
        seen = mask[:, : done + count] if padded else None
        if isinstance(changes.get("bias"), Tensor):
            options["bias"] = changes["bias"][..., : done + count]
        on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
        kernels = partial(attend_and_append, attention_reference)
        out = cached_attention_mutating(
            *new, ours, start.to(DEVICE), seen, **on_device, layout=layout, kernels=kernels
        )
        cpu = [t.cpu() for t in new]
        expected = cached_attention_mutating(
            *cpu, theirs, start, None if seen is None else seen.cpu(), **options, layout=layout
        )
        start += count
        torch.testing.assert_close(out.cpu(), expected, rtol=close, atol=close)
        assert out.is_contiguous()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(numbers(one), numbers(other))


def numbers(x: Tensor) -> Tensor:
    """e4m3 numbers cannot be compared as they are."""
    return x.cpu().float() if x.dtype == torch.float8_e4m3fn else x.cpu()


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(case: str) -> None:
    steps("k4v2g32r8s4", (16, 8), [2, 70, 1, 1, 3, 20, 8, 1], True, **CASES[case])


@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        ("", (16, 8)),
        ("", (16, 80)),
        ("k2v8g32r0s0", (16, 16)),
        ("0:k8v2g32r5s1|1:exact", (24, 8)),
        ("k4v16g32r5s3", (10, 6)),
        ("k16v4g64r3s0", (5, 12)),
        ("kf8vf8g32r5s3", (10, 6)),
    ],
)
def test_layouts(layout: str, dims: tuple[int, int]) -> None:
    steps(layout, dims, [1, 60, 1, 1, 9, 30, 1], False)


@pytest.mark.parametrize("layout", ["k4v2g32r8s4", ""])
def test_what_is_too_much_for_one_launch(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.kernels.kv_append.triton.PLACES", (0, 0))
    steps(layout, (16, 8), [70, 1, 3, 1], True)


@pytest.mark.parametrize(
    ("layout", "dim", "kernel"),
    [
        ("", 16, "_decode_exact_kernel"),
        ("k4v2g32r8s4", 16, "_decode_kernel"),
        ("k4v4g64r8s4", 64, "_decode_packed_kernel"),
    ],
)
def test_a_decoding_step_is_two_launches(
    layout: str, dim: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reads the cache, the other joins what that found and stores the new token."""
    launched: list[str] = []
    run = type(_finish_kernel).run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(_finish_kernel), "run", noted)
    steps(layout, (dim, dim), [90, 1], False, 5e-4)  # integer products are of 15 bits
    assert launched[-2:] == [kernel, "_finish_kernel"]
    assert not any("decode" in name for name in launched[:-2])


@pytest.mark.parametrize("case", CASES)
def test_an_exact_cache_is_read_on_the_device(case: str) -> None:
    steps("", (16, 8), [2, 70, 1, 1, 3, 20, 8, 1], True, **CASES[case])


@pytest.mark.parametrize("layout", ["", "k4v2g32r8s4"])
@pytest.mark.parametrize("sink", [0, 3, 75])
def test_what_a_window_hides_is_left_out(layout: str, sink: int) -> None:
    """Without padding, where tiles between sink tokens and window are not read."""
    steps(layout, (16, 8), [150, 1, 60, 3, 1], False, window=[17, 0], sink_tokens=[sink, 0])


def test_short_blocks_of_a_crop() -> None:
    """Both sides continue from a state in which a block holds fewer tokens than its slots."""
    layout, fmt = "k4v4g32r0s2", parse("k4v4g32r0s2").classes[0].format
    assert fmt is not None
    start = torch.tensor(55)
    states = [allocate(parse(layout), 1, KV, 8, 8, 160, torch.float32) for _ in range(2)]
    for state in states:
        torch.manual_seed(0)
        x = (
            torch.randn(1, KV * GROUP, 100, 8),
            torch.randn(1, KV, 100, 8),
            torch.randn(1, KV, 100, 8),
        )
        run_reference(x, state, torch.zeros((), dtype=torch.int64), layout)
        state[0].clamp_(max=53)
    device = [t.to(DEVICE) for t in states[1]]
    for count in (1, 3, 40, 1):
        x = (torch.randn(1, KV * GROUP, count, 8), *torch.randn(2, 1, KV, count, 8))
        expected = run_reference(x, states[0], start, layout)
        moved = tuple(t.to(DEVICE) for t in x)
        out = run_reference(moved, device, start.to(DEVICE), layout, kernels=True)
        torch.testing.assert_close(out.cpu(), expected, rtol=3e-6, atol=3e-6)
        start += count
        for one, other in zip(device, states[0], strict=True):
            assert torch.equal(one.cpu(), other)
    assert states[0][0].tolist()[:5] == [0, 32, 53, 64, 96]


def run_reference(
    x: tuple[Tensor, ...], state: list[Tensor], start: Tensor, layout: str, kernels: bool = False
) -> Tensor:
    chosen = partial(attend_and_append, attention_reference) if kernels else None
    return cached_attention_mutating(
        *x, state, start, None, None, None, 0.25, True, [0], 0.0, [0], layout,  # type: ignore[arg-type]
        kernels=chosen,
    )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_join(splits: int) -> None:
    layout = "k2v4g32r4s2"
    fmt = parse(layout).classes[0].format
    assert fmt is not None
    x = (draw(1, KV * GROUP, 126, 8), draw(1, KV, 126, 8), draw(1, KV, 126, 8))
    state = allocate(parse(layout), 1, KV, 8, 8, 160, torch.float32, DEVICE)
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    run_reference(x, state, zero, layout)
    q, k, v = draw(1, KV * GROUP, 2, 8), draw(1, KV, 2, 8), draw(1, KV, 2, 8)
    mask = torch.ones(1, 128, dtype=torch.long, device=DEVICE)
    mask[:, :70] = 0
    arguments = Arguments(q, None, None, 0.3, True, [0], 0.0, [0])
    _, _, part = split_state(parse(layout), KV, state)[0]
    new = {"key": k, "value": v}
    start = torch.tensor(126, device=DEVICE)
    out = decode(arguments, new, part, start, ranks(mask), fmt, splits).joined()
    expected = attend_image(attention_reference, arguments, new, part, mask, fmt, 126)
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=3e-6)


def test_a_row_without_keys_is_zero() -> None:
    layout = "k4v4g32r0s0"
    fmt = parse(layout).classes[0].format
    assert fmt is not None
    state = allocate(parse(layout), 1, 1, 8, 8, 64, torch.float32, DEVICE)
    _, _, part = split_state(parse(layout), 1, state)[0]
    arguments = Arguments(draw(1, 1, 1, 8), None, None, 1.0, True, [0], 0.0, [0])
    new = {"key": draw(1, 1, 1, 8), "value": draw(1, 1, 1, 8)}
    nothing = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    start = torch.zeros((), dtype=torch.int64, device=DEVICE)
    assert not decode(arguments, new, part, start, nothing, fmt).joined().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout",
    ["k4v4g128r64s4", "k2v2g64r64s4", "k8v4g64r0s0", "kf8vf8g128r64s4", "k8vf8g64r0s0", ""],
)
def test_operator_on_the_device(layout: str, dtype: torch.dtype) -> None:
    """As near to float64 over the same stored bytes as plain attention of the dtype."""
    dims, batch, prompt = (128, 128), 2, 1500
    state = allocate(parse(layout), batch, 4, *dims, 1600, dtype, DEVICE)
    start = torch.zeros((), dtype=torch.int64, device=DEVICE)
    rest = (None, None, 128**-0.5, True, [0], 0.0, [0])
    mask = torch.ones(batch, 1600, dtype=torch.long, device=DEVICE)
    mask[0, :77] = 0
    for count in [prompt, *[1] * 70, 5]:
        done = int(start)
        new = [draw(batch, heads, count, 128, dtype=dtype) for heads in (16, 4, 4)]
        seen = mask[:, : done + count]
        exact = exactly(new, state, done, seen, layout)
        out = cached_attention(*new, state, start, seen, *rest, layout)
        start += count
        error = (out.double() - exact).norm() / exact.norm()
        assert error < 4 * torch.finfo(dtype).eps


def widened(x: Tensor) -> Tensor:
    """float64 of what is no code."""
    return x.double() if x.is_floating_point() and x.itemsize > 1 else x


def exactly(
    new: list[Tensor], state: list[Tensor], begin: int, mask: Tensor, layout: str
) -> Tensor:
    arguments = Arguments(new[0].double(), None, None, 128**-0.5, True, [0], 0.0, [0])
    wide = {"key": new[1].double(), "value": new[2].double()}
    _, fmt, part = split_state(parse(layout), 4, state)[0]
    part = {name: widened(t) for name, t in part.items()}
    if fmt is not None:
        return attend_image(attention_reference, arguments, wide, part, mask, fmt, begin)
    keys, values = (torch.cat([part[s][:, :, :begin], wide[s]], 2) for s in ("key", "value"))
    return arguments.attend(attention_reference, keys, values, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["k4v4g64r64s4", ""])
def test_a_decoding_step_is_a_cuda_graph(layout: str) -> None:
    eager, graphed = (
        allocate(parse(layout), 2, 4, 64, 64, 600, torch.bfloat16, DEVICE) for _ in range(2)
    )
    rest = (None, None, None, 0.125, True, [0], 0.0, [0], layout)
    prompt = [draw(2, heads, 300, 64, dtype=torch.bfloat16) for heads in (8, 4, 4)]
    starts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    for state, start in zip((eager, graphed), starts, strict=True):
        cached_attention(*prompt, state, start, *rest)
        start += 300
    new = [draw(2, heads, 1, 64, dtype=torch.bfloat16) for heads in (8, 4, 4)]
    kept = [t.clone() for t in graphed]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cached_attention(*new, graphed, starts[1], *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cached_attention(*new, graphed, starts[1], *rest)
        starts[1] += 1
    for tensor, value in zip(graphed, kept, strict=True):
        tensor.copy_(value)
    starts[1].fill_(300)
    for _ in range(150):
        for tensor in new:
            tensor.normal_()
        expected = cached_attention(*new, eager, starts[0], *rest)
        starts[0] += 1
        graph.replay()
        assert torch.equal(out, expected)
    for one, other in zip(eager, graphed, strict=True):
        assert torch.equal(one, other)


COMPILE = """
from fxopt.kernels.kv_append import triton as append
from fxopt.kernels.kv_attention import triton as decode
from fxopt.kernels.kv_exact import triton as exact
from tests.kernels.ahead_of_time import build

def show(kernel, pointers, **constants):
    print(kernel.__name__, len(build(kernel, pointers, **constants).asm["cubin"]))

p, long = "*bf16", "*i64"
state = dict(
    key="*u8", key_scale=p, key_zero=p, value="*u8", value_scale=p, value_zero=p,
    recent_k=p, recent_v=p, rank="*i32", start_ptr=long, k=p, v=p,
)
shares = dict(out="*fp32", out_m="*fp32", out_l="*fp32", scale="fp32", softcap="fp32")
masks = dict(bias=p, windows=long)
starts = dict(block_start=long, counts=long, sink_k=p, sink_v=p)
every = dict(
    CAUSAL=True, HAS_RANK=True, HAS_BIAS=True, HAS_WINDOW=True, HAS_SOFTCAP=True, UPCAST=False,
    OVERLAP=True,
)
show(
    exact._decode_exact_kernel, dict(state, key=p, value=p, q=p, **masks, **shares),
    G=4, D=64, DV=48, BLOCK_M=16, BLOCK_D=64, BLOCK_V=64, BLOCK_T=64, BLOCK_N=16, STAGES=3,
    SIZE=0, **every,
)
joined = dict(partial="*fp32", top="*fp32", total="*fp32", sinks=p, out=p)
join = dict(G=4, BLOCK_S=64, BLOCK_V=32, WAITS=True)
none = dict.fromkeys(("key_scale", "key_zero", "value_scale", "value_zero", "table", "counts"))
show(
    append._finish_kernel, dict(state, key=p, value=p, **starts, **joined),
    D=64, DV=48, HAS_RANK=False, EXACT=True, BLOCK_K=0, BLOCK_W=64, BLOCK_D=64, BLOCK_T=16,
    BLOCK=16, GROUP=0, SINK=0, K_BITS=0, V_BITS=0, **join, **none,
)
e4m3 = dict(key="*fp8e4nv", value="*fp8e4nv")
for bits, value_bits, group, kind in ((4, 2, 64, {}), (16, 8, 32, dict(key=p)), (8, 8, 64, e4m3)):
    side = dict(K_BITS=bits, V_BITS=value_bits, GROUP=group, SINK=4, table=None)
    wide = 32 if bits == 4 else 64
    show(
        decode._decode_kernel,
        dict(state, **kind, **starts, q=p, **masks, **shares),
        G=4, D=64, DV=48, BLOCK_M=16, BLOCK_D=64, BLOCK_V=64, BLOCK_T=group, HAS_LIST=False,
        **every, **side,
    )
    show(
        append._pack_kernel, dict(state, **kind, counts=long),
        D=64, DV=48, HAS_RANK=True, BLOCK_K=wide, BLOCK_V=64, **side,
    )
    show(
        append._finish_kernel,
        dict(state, **kind, **starts, **joined),
        D=64, DV=48, HAS_RANK=True, EXACT=False, BLOCK_K=wide, BLOCK_W=64, BLOCK_D=64, BLOCK_T=16,
        BLOCK=512, **join, **side,
    )
for alone in (False, True):
    show(
        append._keep_kernel,
        dict(k=p, v=p, start_ptr=long, counts=long, sink_k=p, sink_v=p, recent_k=p, recent_v=p),
        D=64, DV=48, SINK=4, EXACT=alone, BLOCK_T=32, BLOCK_D=64, BLOCK_V=64,
    )
show(
    append._plan_kernel, dict(start_ptr=long, block_start=long, counts=long), GROUP=64, BLOCK=512,
)
show(
    decode._join_kernel, joined, G=4, DV=48, BLOCK_S=64, BLOCK_V=64,
)
"""


@pytest.mark.slow
def test_compile_ahead_of_time_for_hopper() -> None:
    compiled(COMPILE)
