"""Attention whose prompts make up for hidden keys: the op, its spellings, the kernel's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt.kernels.attention.op  # noqa: F401 (registers the op)
from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention import REFERENCE, attention_with_lse
from fxopt.kernels.attention.delta import EVERY, ask_reference, corrected_rows
from fxopt.kernels.attention.op import attention_cuda
from fxopt.kernels.attention.spec import bind
from fxopt.kernels.kv_attention import (
    allocate,
    cached_attention,
    cached_attention_functional,
    decoded_attention,
    empty_past,
    parse,
)
from tests.kernels.attention_file import AttentionFile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not AVAILABLE, reason="needs triton")


def make(
    queries: int, keys: int, kv: int = 2, group: int = 2, batch: int = 2, dim: int = 16,
    dtype: torch.dtype = torch.float32, padding: int = 0, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    q, k, v = (
        torch.randn(batch, n, h, dim, device=DEVICE).to(dtype).transpose(1, 2)
        for n, h in ((queries, kv * group), (keys, kv), (keys, kv))
    )
    call: dict[str, Any] = {
        "q": 2 * q, "k": k, "v": v, "mask": None, "bias": None, "sinks": None,
        "scale": dim**-0.5, "causal": True, "window": [100], "softcap": 0.0, "sink_tokens": [4],
        "top": [0], "delta": [500],
    }  # fmt: skip
    if padding:
        call["mask"] = torch.ones(batch, keys, dtype=torch.int64, device=DEVICE)
        call["mask"][0, :padding] = 0
    assert options.keys() <= call.keys()
    return call | options


def attend(call: dict[str, Any], **options: Any) -> Tensor:
    return torch.ops.fxopt.attention(*(call | options).values())


def definition(call: dict[str, Any]) -> Tensor:
    """Row by row, from attention with and without what hides keys."""
    wide = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in call.items()
    }
    none = {"window": [0], "sink_tokens": [0], "top": [0], "delta": [0]}
    dense, sparse = attend(wide, **none), attend(wide, delta=[0])
    heads, kv = call["q"].shape[1], call["k"].shape[1]
    delta = call["delta"] * (heads // len(call["delta"]))
    tiles = (call["q"].shape[2] + 127) // 128
    out = sparse.clone()
    for head in range(heads):
        first = head // (heads // kv) * (heads // kv)
        if not any(delta[first : first + heads // kv]):
            continue
        for row in range(call["q"].shape[2]):
            asked = row - row % 64
            if row >= (tiles - 2) * 128 or row == asked:
                out[:, row, head] = dense[:, row, head]
            else:
                found = dense[:, asked, head] - sparse[:, asked, head]
                out[:, row, head] += delta[head] / 1000 * found
    return out


CASES: list[dict[str, Any]] = [
    {"queries": 600, "keys": 600},
    {"queries": 513, "keys": 1111, "window": [0, 90], "delta": [0, 0, 1, 1000]},
    {"queries": 500, "keys": 501, "padding": 70, "softcap": 3.0},
    {"queries": 1300, "keys": 1300, "window": [200, 0], "top": [0, 100], "delta": [9, 0, 300, 7]},
    {"queries": 700, "keys": 1500, "padding": 131, "window": [0], "top": [200], "group": 1},
    {"queries": 530, "keys": 530, "kv": 1, "group": 3, "delta": [250, 0, 900]},
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_followers_add_their_share_of_what_an_asked_row_finds(number: int) -> None:
    call = make(**CASES[number])
    if number == 5:
        call["sinks"] = torch.randn(3, device=DEVICE)
    expected = definition(call)
    assert (expected - attend(call, delta=[0]).double()).abs().max() > 0.01
    for out in (attend(call), REFERENCE(*call.values()), attention_cuda(*call.values())):
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    call = make(400, 400, dtype=dtype)
    expected = definition(call)
    own = (attend(call, delta=[0]).double() - definition(call | {"delta": [0]})).abs().max()
    assert (attend(call).double() - expected).abs().max() <= 4 * own


@settings(max_examples=20, deadline=None)
@given(queries=st.integers(1, 700), past=st.integers(0, 300), share=st.integers(1, 1000))
def test_no_row_knows_a_later_one(queries: int, past: int, share: int) -> None:
    """Keys, values and queries from some position on are replaced: nothing before it changes."""
    call = make(queries, past + queries, kv=1, group=1, batch=1, delta=[share], window=[40])
    at = int(torch.randint(queries, ()))
    other = make(queries, past + queries, kv=1, group=1, batch=1, delta=[share], window=[40])
    mixed = dict(call)
    for name in "qkv":
        place = at if name == "q" else past + at
        mixed[name] = torch.cat([call[name][:, :, :place], other[name][:, :, place:]], 2)
    torch.testing.assert_close(attend(mixed)[:, :at], attend(call)[:, :at])


@pytest.mark.parametrize(("queries", "keys"), [(256, 900), (1, 900), (64, 64)])
def test_short_calls_see_all_keys(queries: int, keys: int) -> None:
    call = make(queries, keys)
    assert not corrected_rows(queries)
    for spelling in (torch.ops.fxopt.attention, REFERENCE):
        torch.testing.assert_close(
            spelling(*call.values()), attend(call, window=[0], delta=[0]), rtol=1e-4, atol=1e-5
        )


def test_nothing_hidden_is_nothing_to_correct() -> None:
    call = make(400, 400, window=[0])
    assert torch.equal(attend(call), attend(call, delta=[0]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": [1, 2, 3]}, "delta has 3 entries; give 1 or 4, the query heads"),
        ({"delta": [1001]}, "per mille of what rows that see all keys find"),
        ({"causal": False}, "delta needs causal attention"),
        ({"bias": torch.zeros(1, 1, 1, 300)}, "delta does not look at a bias"),
    ],
)
def test_misfits_are_named(wrong: dict[str, Any], message: str) -> None:
    call = make(300, 300) | wrong
    with pytest.raises(ValueError, match=message):
        torch.ops.fxopt.attention(*call.values())


def test_corrected_rows_have_no_log_sum_exp() -> None:
    with pytest.raises(ValueError, match="delta corrects"):
        attention_with_lse(*make(300, 300).values())


def test_gradients_are_those_of_the_formula() -> None:
    call = make(420, 420, batch=1, dim=4, dtype=torch.float64, delta=[300, 1000, 0, 0])
    leaves = [call[name].clone().requires_grad_() for name in "qkv"]
    named = call | dict(zip("qkv", leaves, strict=True))
    weights = torch.randn(1, 420, 4, 4, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad((REFERENCE(*named.values()) * weights).sum(), leaves)
    found = torch.autograd.grad((attend(named) * weights).sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_opcheck() -> None:
    call = make(300, 300, batch=1, kv=1, dim=4)
    for name in "qkv":
        call[name] = call[name].detach().requires_grad_()
    torch.library.opcheck(torch.ops.fxopt.attention.default, tuple(call.values()))


@needs_triton
@pytest.mark.parametrize("number", [0, 1, 2, 4, 5])
def test_the_kernel_asks_every_row_that_the_reference_asks(number: int) -> None:
    from fxopt.kernels.attention.op import ask

    call = bind(**make(**CASES[number])).without_limits()
    asked = ask(call)
    assert asked.shape[1] == -(-call.q.shape[2] // EVERY)
    torch.testing.assert_close(asked, ask_reference(call), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    "options", [{"kv": 1, "group": 1}, {"window": [90, 0], "delta": [200, 0, 0, 0]}]
)
def test_what_cuda_launches_is_put_together(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split by heads of the CUDA op, its kernels interpreted where there is no GPU."""
    from fxopt.kernels.attention import op

    monkeypatch.setattr(op, "_has_kernel", lambda q: True)
    call = make(390, 390, batch=1, **options)
    expected = definition(call)
    torch.testing.assert_close(op.attention_cuda(*call.values()).double(), expected, rtol=1e-4,
                               atol=1e-5)  # fmt: skip


@pytest.mark.slow
@needs_triton
def test_the_asked_rows_visit_no_tile_behind_them() -> None:
    """NaN in the keys and values that an asked row must not see, a tile and more after it."""
    from fxopt.kernels.attention.op import ask

    call = bind(**make(9000, 9000, kv=1, group=1, batch=1)).without_limits()
    for x in (call.k, call.v):
        x[:, :, 8320:] = torch.nan
    found = ask(call)[:, :128]  # the first tile of them, up to position 8,128
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "layout", ["", "k4v4g32r8s4", "0:k8v4g32r8s4|1:exact", "0:exact|1:exact+t64"]
)
def test_a_cache_is_corrected_in_prompts_and_seen_whole_in_decoding(layout: str) -> None:
    prompt, total, delta = 500, 800, [400, 0, 0, 0]
    window = [90, 0 if "+t" in layout else 60]
    call = make(total, total, dtype=torch.float64, padding=130, window=window, delta=delta)
    state = allocate(parse(layout), 2, 2, 16, 16, total, torch.float64)
    past = empty_past(parse(layout), 2, 2, 16, 16, torch.float64)
    start, outputs = torch.zeros((), dtype=torch.int64), list[Tensor]()
    options = (None, None, 0.25, True, window, 0.0, [4], layout)
    for count in (prompt, 1, 2, 290):
        done = int(start)
        new = [call[name][:, :, done : done + count] for name in "qkv"]
        seen = call["mask"][:, : done + count]
        out = cached_attention(*new, state, start, seen, *options, delta=delta)
        functional, past = cached_attention_functional(*new, past, seen, *options, delta=delta)
        torch.testing.assert_close(functional, out, rtol=1e-10, atol=1e-12)
        outputs.append(out)
        start += count
    first = call | {name: call[name][:, :, :prompt] for name in "qkv"}
    first["mask"] = call["mask"][:, :prompt]
    torch.testing.assert_close(outputs[0], definition(first), rtol=1e-10, atol=1e-12)
    at_once = decoded_attention(
        *(call[name] for name in "qkv"), call["mask"], *options, prompt, delta=delta
    )
    rows = slice(prompt, prompt + 1)
    torch.testing.assert_close(at_once[:, :prompt], outputs[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(at_once[:, rows], outputs[1], rtol=1e-10, atol=1e-12)
    if not layout:
        none = {"window": [0, 60], "delta": [0]}
        torch.testing.assert_close(
            at_once[:, prompt:], attend(call, **none)[:, prompt:], rtol=1e-10, atol=1e-12
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_onnx_corrects_the_same_rows(number: int) -> None:
    """One file for prompts and for single tokens."""
    call = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in make(**CASES[number]).items()}
    call["mask"] = torch.ones(2, call["k"].shape[2], dtype=torch.int64)
    file = AttentionFile(call)
    assert file.domains <= {""}
    for queries, keys, hidden in ((1400, 1400, 140), (1, 1301, 140), (350, 651, 0), (5, 9, 2)):
        new = make(queries, keys, padding=hidden)
        mask = new["mask"] if hidden else torch.ones(2, keys, dtype=torch.int64)
        call |= {name: new[name].cpu() for name in "qkv"} | {"mask": mask.cpu()}
        out = file.run(call)
        expected = torch.ops.fxopt.attention(*call.values())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 500])
def test_long_prompts_on_the_device(dtype: torch.dtype, padding: int) -> None:
    call = make(5000, 5000, group=4, dim=128, dtype=dtype, padding=padding, window=[300])
    expected = definition(call)
    own = (attend(call, delta=[0]).double() - definition(call | {"delta": [0]})).abs().max()
    assert (attend(call).double() - expected).abs().max() <= 8 * own
