"""The kernels of decoding that reads some tiles: interpreted, compiled for sm_90, on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.decode_topk.triton import kept_list
from fxopt.kernels.kv_attention import allocate, parse
from fxopt.kernels.kv_attention.device import attend_and_append
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.layout import split_state
from fxopt.kernels.kv_attention.mutating import cached_attention_mutating
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KV, GROUP = 2, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize(
    ("layout", "dims", "masked"),
    [
        ("exact+t96", (24, 17), True),
        ("exact+t128", (16, 16), False),
        ("exact+t96/3", (24, 17), True),
        pytest.param("0:k4v4g32r40s4+t96/4|1:exact+t96/2", (16, 16), False, marks=pytest.mark.slow),
        pytest.param("k8v4g64r8s4+t128/40", (64, 64), True, marks=pytest.mark.slow),
        # of planes that no int8 instruction takes
        pytest.param("k4v4g32r40s4+t64", (24, 16), True, marks=pytest.mark.slow),
        pytest.param("kf8vf8g32r40s4+t64", (24, 16), True, marks=pytest.mark.slow),
        pytest.param("0:k8v4g64r8s4+t128|1:exact+t96", (64, 64), True, marks=pytest.mark.slow),
        pytest.param("k4v4g64r8s0+t128", (64, 64), False, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_reference(layout: str, dims: tuple[int, int], masked: bool) -> None:
    """Outputs are close and the tensors of the cache equal, also where several tokens come at
    once, which see all."""
    chunks, total = [280, 1, 3, 3, 1, 31, 1], 320
    if "/" in layout:
        # kept where a tile of exact tokens becomes whole, and where a block is packed
        chunks = [265, 1, 1, 1, 1, 1, 3, 10, 1, 1, 1, 1, 1, 1, 3, 1]
    sizes = ((KV * GROUP, dims[0]), (KV, dims[0]), (KV, dims[1]))
    x = [draw(2, heads, total, dim) for heads, dim in sizes]
    mask = torch.ones(2, total, dtype=torch.int64, device=DEVICE)
    mask[1, :75] = 0
    mask[1, 300:306] = 0  # in a tile that a kernel notes
    states = [allocate(parse(layout), 2, KV, *dims, total, torch.float32, DEVICE) for _ in range(2)]
    start = torch.zeros((), dtype=torch.int64, device=DEVICE)
    ways = None, partial(attend_and_append, attention_reference)
    # Integers are multiplied with 15 bits of what is no integer.
    close = 1e-3 if dims[0] == 64 else 1e-5
    for count in chunks:
        done = int(start)
        new = [t[:, :, done : done + count].contiguous() for t in x]
        options = (None, None, 0.3, True, [0], 0.0, [0], layout)
        seen = mask[:, : done + count] if masked else None
        expected, found = (
            cached_attention_mutating(
                *new, state, start, seen, *options, kernels=kernels if done else None
            )
            for state, kernels in zip(states, ways, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        equal_states(layout, *states)
        if count == 1 and "/" not in layout:
            assert max(read_tokens(layout, states[1], new[0], start)) <= 160
        start += count


def equal_states(layout: str, *states: list[Tensor]) -> None:
    """The same tensors; of a choice the tiles that count, in any order."""
    parts = (split_state(parse(layout), KV, state) for state in states)
    for (_, _, one), (_, _, other) in zip(*parts, strict=True):
        for name in one.keys() - {"choice"}:
            a, b = one[name].float(), other[name].float()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if "choice" in one:
            counts = one["chosen_at"][..., 2].flatten().tolist()
            rows = (part["choice"].flatten(0, 1) for part in (one, other))
            for a, b, count in zip(*rows, counts, strict=True):
                assert a[:count].sort().values.tolist() == b[:count].tolist()


def read_tokens(layout: str, state: list[Tensor], q: Tensor, start: Tensor) -> list[int]:
    """How many tokens of tiles the lists of each head class name."""
    parsed, read = parse(layout), []
    arguments = Arguments(
        q, None, None, 0.3, True, [0], 0.0, [0], top_keys=parsed.top_keys(KV)
    )  # fmt: skip
    for heads, fmt, part in split_state(parsed, KV, state):
        kept = kept_list(arguments.select(heads, KV), part, start, None, fmt)
        assert kept is not None
        listed, count = kept
        size = 32 if fmt is None else fmt.group
        for row, many in zip(listed, count.tolist(), strict=True):
            chosen = row[:many].tolist()
            assert chosen == sorted(set(chosen))
            read.append(size * many)
    return read


def test_short_pasts_are_read_whole() -> None:
    x = draw(1, KV * GROUP, 75, 16), draw(1, KV, 75, 16), draw(1, KV, 75, 16)
    outputs: list[Tensor] = []
    for layout in ("", "exact+t96"):
        state = allocate(parse(layout), 1, KV, 16, 16, 75, torch.float32, DEVICE)
        start = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for count in (74, 1):
            done = int(start)
            new = [t[:, :, done : done + count].contiguous() for t in x]
            out = cached_attention_mutating(
                *new, state, start, None, None, None, 0.3, True, [0], 0.0, [0], layout,
                kernels=partial(attend_and_append, attention_reference),
            )  # fmt: skip
            start += count
        outputs.append(out)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


COMPILE = """
from fxopt.kernels.decode_topk import triton as topk
from fxopt.kernels.kv_attention import triton as decode
from fxopt.kernels.kv_exact import triton as exact
from tests.kernels.ahead_of_time import build

def ptx(kernel, pointers, **constants):
    return build(kernel, pointers, pointers, **constants).asm["ptx"]

p, long, wide, ints = "*bf16", "*i64", "*fp32", "*i32"
starts = dict(start_ptr=long, block_start=long)
state = dict(
    starts, q=p, k=p, v=p, key=p, value=p, rank=ints, windows=long, bias=p, out=wide, out_m=wide,
    out_l=wide, scale="fp32", softcap="fp32", listed=ints,
)
plain = dict(
    G=4, D=128, DV=128, CAUSAL=True, HAS_RANK=False, HAS_BIAS=False, HAS_WINDOW=False,
    HAS_SOFTCAP=False, UPCAST=False, BLOCK_M=16, BLOCK_D=128, BLOCK_V=128,
    OVERLAP=True,
)
text = ptx(
    exact._decode_exact_kernel, dict(state, counts=ints), SIZE=32, BLOCK_T=128, BLOCK_N=16,
    STAGES=3, **plain,
)
assert "cp.async.cg.shared.global" in text
ptx(
    decode._decode_kernel,
    dict(
        state, key="*u8", key_scale=p, key_zero=p, value="*u8", value_scale=p, value_zero=p,
        recent_k=p, recent_v=p, sink_k=p, sink_v=p, counts=long, listed_count=ints,
    ),
    HAS_LIST=True, K_BITS=4, V_BITS=4, GROUP=64, SINK=4, BLOCK_T=64, table=None, **plain,
)
for group in (0, 64):
    for age in (dict(chosen_at=None), {}):
        ptx(
            topk._estimate_kernel,
            dict(starts, q=p, low=p, high=p, out=wide, scale="fp32", width="fp32", chosen_at=ints),
            G=4, D=128, GROUP=group, BLOCK_D=128, BLOCK_T=32, table=None, **age,
        )
        ptx(
            topk._choose_kernel,
            dict(starts, mass=wide, shown="*u8", tiles_ptr=ints, count_ptr=ints, chosen_at=ints),
            G=4, GROUP=group, HAS_SHOWN=True, BLOCK=4096, BLOCK_N=2, **age,
        )
ptx(
    topk._note_kernel, dict(key=p, shown="*i64", low=p, high=p, start_ptr=long),
    D=128, HAS_SHOWN=True, BLOCK_D=128,
)
"""


@pytest.mark.slow
def test_compiles_ahead_of_time_for_hopper() -> None:
    compiled(COMPILE)
