"""Attention through packed blocks against plain attention over what the oracle gives back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels.kv_attention import (
    allocate,
    cached_attention,
    cached_attention_functional,
    decoded_attention,
    empty_past,
    parse,
)
from fxopt.kernels.kv_attention.layout import split_state
from fxopt.kernels.kv_attention.mutating import gather
from tests.oracle import FakeQuantizedLayer

LAYOUTS = [
    "",
    "k4v4g32r8s4",
    "k2v8g32r0s0",
    "k8v2g64r5s1",
    "kf8vf8g32r8s4",
    "0:k8v4g32r8s4|1:exact",
    "1:k4v16g32r5s3|0:k16v2g32r40s4",
]
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(
    length: int, dtype: torch.dtype = torch.float64, *, batch: int = 2, kv: int = 2, group: int = 3
) -> Inputs:
    q = torch.randn(batch, kv * group, length, 16, dtype=dtype)
    return (
        q,
        torch.randn(batch, kv, length, 16, dtype=dtype),
        torch.randn(batch, kv, length, 8, dtype=dtype),
    )


def padding(batch: int, length: int, left: int = 11) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, :left] = 0
    return mask


def options(**changes: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "bias": None, "sinks": None, "scale": 0.25, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0],
    }  # fmt: skip
    return {**plain, **changes}


def expected(x: Inputs, chunks: list[int], mask: Tensor | None, layout: str, **o: object) -> Tensor:
    """Row by row, over what the oracle's cache returns in each call."""
    layer = FakeQuantizedLayer(layout, mask)
    outputs: list[Tensor] = []
    done = 0
    for count in chunks:
        q, k, v = (t[:, :, done : done + count] for t in x)
        keys, values = layer.update(k, v)
        outputs.append(dense(q, keys, values, mask, done, **o))
        done += count
    return torch.cat(outputs, 1)


def dense(q, k, v, mask, first, *, bias, sinks, scale, causal, window, softcap, sink_tokens):
    group, total = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = (
            scores
            + bias[:, :, -q.shape[2] if bias.shape[2] == 1 else first :][:, :, : q.shape[2], :total]
        )
    rows, columns = first + torch.arange(q.shape[2])[:, None], torch.arange(total)
    seen = (columns <= rows).expand(q.shape[0], q.shape[1], -1, -1).clone()
    known = torch.ones(q.shape[0], total) if mask is None else (mask[:, :total] != 0).float()
    order = known.cumsum(1)
    for head in range(q.shape[1]):
        near = window[head // group if len(window) > 1 else 0]
        first_ones = sink_tokens[head // group if len(sink_tokens) > 1 else 0]
        if near:
            seen[:, head] &= (rows - columns < near) | (order <= first_ones)[:, None]
    seen &= known[:, None, None] > 0
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        extra = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def run(x: Inputs, chunks: list[int], mask: Tensor | None, layout: str, **o: object):
    """(outputs, state) of the mutating op over `chunks`."""
    total = sum(chunks)
    state = allocate(parse(layout), x[1].shape[0], x[1].shape[1], 16, 8, total, x[0].dtype)
    start = torch.zeros((), dtype=torch.int64)
    outputs: list[Tensor] = []
    for count in chunks:
        done = int(start)
        part = [t[:, :, done : done + count] for t in x]
        seen = None if mask is None else mask[:, : done + count]
        changed = dict(o)
        if isinstance(o["bias"], Tensor):
            bias = o["bias"] if o["bias"].shape[2] == 1 else o["bias"][:, :, done : done + count]
            changed["bias"] = bias[..., : done + count]
        outputs.append(cached_attention(*part, state, start, seen, **changed, layout=layout))
        start += count
    return torch.cat(outputs, 1), state


CASES = {
    "plain": {},
    "window": {"window": [29], "sink_tokens": [3]},
    "by head": {"window": [0, 17], "sink_tokens": [0, 2]},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 6, dtype=torch.float64)},
    "bias": {"bias": torch.linspace(-1, 1, 6 * 150, dtype=torch.float64).view(1, 6, 1, 150)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_sees_packed_tokens(layout: str, case: str) -> None:
    x, mask, chunks = inputs(150), padding(2, 150), [70, 1, 1, 50, *[1] * 28]
    o = options(**CASES[case])
    out, _ = run(x, chunks, mask, layout, **o)
    torch.testing.assert_close(out, expected(x, chunks, mask, layout, **o), rtol=1e-10, atol=1e-12)
    assert out.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_packed_tokens_are_really_used(layout: str) -> None:
    x, chunks = inputs(150), [100, *[1] * 50]
    out, _ = run(x, chunks, None, layout, **options())
    plain = dense(*x, None, 0, **options())
    assert torch.equal(out[:, :100], run(x, [100], None, layout, **options())[0])
    assert (out[:, :100] - plain[:, :100]).abs().max() < 1e-12
    assert (out[:, 100:] - plain[:, 100:]).abs().max() > 1e-6


ONE_PASS = [(case, torch.float64) for case in CASES] + [("plain", torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), ONE_PASS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_equals_decoding(layout: str, case: str, dtype: torch.dtype) -> None:
    x, mask, prompt = inputs(117, dtype), padding(2, 117), 37
    o = options(**{
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in CASES[case].items()
    })  # fmt: skip
    if isinstance(bias := o["bias"], Tensor):
        o["bias"] = bias[..., :117]
    decoded, _ = run(x, [prompt, *[1] * (117 - prompt)], mask, layout, **o)
    one = decoded_attention(*x, mask, **o, layout=layout, prompt=prompt)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(one, decoded, rtol=tolerance, atol=tolerance)


def test_one_pass_with_a_bias_for_each_query() -> None:
    x, bias = inputs(90), torch.randn(1, 1, 90, 90, dtype=torch.float64)
    o = options(bias=bias)
    decoded, _ = run(x, [20, *[1] * 70], None, "k4v4g32r3s2", **o)
    one = decoded_attention(*x, None, **o, layout="k4v4g32r3s2", prompt=20)
    torch.testing.assert_close(one, decoded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prompt", [0, 1, 63, 500])
def test_one_pass_at_the_edges(prompt: int) -> None:
    x = inputs(63)
    out = decoded_attention(*x, None, **options(), layout="k2v2g32r0s0", prompt=prompt)
    if prompt >= 63:
        torch.testing.assert_close(out, dense(*x, None, 0, **options()))
    else:
        chunks = [prompt, *[1] * (63 - prompt)] if prompt else [1] * 63
        torch.testing.assert_close(out, run(x, chunks, None, "k2v2g32r0s0", **options())[0])


def test_one_pass_needs_whole_sequences() -> None:
    q, k, v = inputs(40)
    with pytest.raises(ValueError, match="38 queries and 40 keys"):
        decoded_attention(q[:, :, 2:], k, v, None, **options(), layout="k4v4g32r0s0", prompt=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_growing_form_stores_the_same_bytes(layout: str) -> None:
    x, mask, chunks = inputs(180, torch.float32), padding(2, 180), [70, 1, 1, 50, *[1] * 58]
    out, state = run(x, chunks, mask, layout, **options())
    past = empty_past(parse(layout), 2, 2, 16, 8, torch.float32)
    outputs: list[Tensor] = []
    done = 0
    for count in chunks:
        part = [t[:, :, done : done + count] for t in x]
        done += count
        o, past = cached_attention_functional(
            *part, past, mask[:, :done], **options(), layout=layout
        )
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), out, rtol=3e-6, atol=3e-6)
    written = split_state(parse(layout), 2, state)
    grown = split_state(parse(layout), 2, past, growing=True)
    for (_, fmt, part), (_, _, other) in zip(written, grown, strict=True):
        for name, tensor in other.items():
            if fmt is not None and name.startswith("recent_"):
                packed = int(part["block_start"][-1])
                places = torch.arange(packed, done - fmt.sink) % part[name].shape[2]
                assert torch.equal(part[name][:, :, places], tensor)
            else:
                assert torch.equal(part[name][:, :, : tensor.shape[2]], tensor)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 45), min_size=1, max_size=9),
    st.sampled_from(LAYOUTS[1:5]),
    st.integers(0, 60),
)
def test_packing_at_once_equals_streaming(chunks: list[int], layout: str, left: int) -> None:
    total = sum(chunks)
    x, mask = inputs(total, torch.float32), padding(2, total, min(left, total))
    (_, _, once), (_, _, streamed) = (
        split_state(parse(layout), 2, run(x, c, mask, layout, **options())[1])[0]
        for c in ([total], chunks)
    )
    blocks = {name for name, tensor in once.items() if tensor.dim() == 5}
    for name in {*blocks, "block_start"}:
        assert torch.equal(once[name], streamed[name])
    fmt = parse(layout).classes[0].format
    assert fmt is not None
    for side in ("key", "value"):
        assert torch.equal(
            *(gather(part, side, fmt, total, torch.float32) for part in (once, streamed))
        )


def test_a_packed_block_is_never_touched_again() -> None:
    layout, x = "k2v2g32r8s0", inputs(200, torch.float32)
    _, early = run(x, [100], None, layout, **options())
    _, late = run(x, [100, *[1] * 100], None, layout, **options())
    (_, _, before), (_, _, after) = (split_state(parse(layout), 2, s)[0] for s in (early, late))
    blocks = before["key"].shape[2]
    assert blocks == 2
    for name in ("key", "key_scale", "key_zero", "value", "value_scale", "value_zero"):
        assert torch.equal(before[name], after[name][:, :, :blocks])


def test_rows_of_a_batch_are_independent() -> None:
    layout, mask = "k4v2g32r8s4", padding(3, 120, 50)
    x = inputs(120, torch.float32, batch=3)
    chunks = [80, *[1] * 40]
    out, state = run(x, chunks, mask, layout, **options())
    for row in range(3):
        alone, single = run(
            tuple(t[row : row + 1] for t in x),  # type: ignore[arg-type]
            chunks, mask[row : row + 1], layout, **options(),
        )  # fmt: skip
        torch.testing.assert_close(out[row : row + 1], alone, rtol=2e-6, atol=2e-6)
        for whole, one in zip(state[1:], single[1:], strict=True):
            assert torch.equal(whole[row : row + 1], one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_plain_attention(dtype: torch.dtype) -> None:
    x, chunks, layout = inputs(150), [100, *[1] * 50], "k4v4g32r8s4"
    half = tuple(t.to(dtype) for t in x)
    wide = tuple(t.double() for t in half)
    out, _ = run(half, chunks, None, layout, **options())  # type: ignore[arg-type]
    plain = dense(*half, None, 0, **options())
    error = (plain.double() - dense(*wide, None, 0, **options())).abs().max()
    # The image is rounded to the dtype, as K and V were.
    exact = expected(wide, chunks, None, layout, **options())  # type: ignore[arg-type]
    assert (out.double() - exact).abs().max() <= 3 * error + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["", "k4v4g32r8s4"])
def test_no_room_is_an_error(layout: str) -> None:
    x = inputs(80, torch.float32)
    state = allocate(parse(layout), 2, 2, 16, 8, 70, torch.float32)
    start = torch.zeros((), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"80 are needed; call cache\.reserve\(80\)"):
        cached_attention(*x, state, start, None, **options(), layout=layout)


@pytest.mark.parametrize("layout", ["", "k4v4g32r8s4"])
def test_mask_has_to_cover_the_past(layout: str) -> None:
    state = allocate(parse(layout), 2, 2, 16, 8, 70, torch.float32)
    start = torch.tensor(20)
    mask = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="mask covers 5 tokens, the cache holds 20 and 5 are new"):
        cached_attention(*inputs(5, torch.float32), state, start, mask, **options(), layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_known_length_stands_for_start(layout: str) -> None:
    x, o = inputs(90, torch.float32), options()
    states = [allocate(parse(layout), 2, 2, 16, 8, 90, torch.float32) for _ in range(2)]
    start = torch.zeros((), dtype=torch.int64)
    # What `start` holds is not read.
    wrong = torch.tensor(7)
    for low, high in ((0, 80), (80, 81), (81, 90)):
        part = [t[:, :, low:high] for t in x]
        expected = cached_attention(*part, states[0], start, None, **o, layout=layout)
        out = cached_attention(*part, states[1], wrong, None, **o, layout=layout, length=low)
        assert torch.equal(out, expected)
        start += high - low
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="mask covers 5 tokens, the cache holds 20 and 1 are new"):
        cached_attention(
            *inputs(1, torch.float32), states[0], start, torch.ones(2, 5), **o,
            layout=layout, length=20,
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["", "0:k4v4g32r8s4|1:exact"])
def test_operator_contract(layout: str) -> None:
    x = inputs(50, torch.float32)
    state = allocate(parse(layout), 2, 2, 16, 8, 60, torch.float32)
    start = torch.zeros((), dtype=torch.int64)
    o = options()
    torch.library.opcheck(cached_attention, (*x, state, start, None, *o.values(), layout))
    torch.library.opcheck(cached_attention, (*x, state, start, None, *o.values(), layout, 0))
    torch.library.opcheck(decoded_attention, (*x, None, *o.values(), "k4v4g32r8s4", 9))


@pytest.mark.slow
def test_compiled_step_does_not_copy_the_state() -> None:
    layout = "k4v4g32r8s4"
    x, o = inputs(60, torch.float32), options()

    def step(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], start: Tensor) -> Tensor:
        return cached_attention(q * 1.0, k, v, state, start, None, **o, layout=layout) + 1

    compiled = torch.compile(step, fullgraph=True)
    states = [allocate(parse(layout), 2, 2, 16, 8, 64, torch.float32) for _ in range(2)]
    start = torch.zeros((), dtype=torch.int64)
    from torch._inductor.utils import run_and_get_code

    addresses = [t.data_ptr() for t in states[0]]
    out, code = run_and_get_code(compiled, *x, states[0], start)
    torch.testing.assert_close(out, step(*x, states[1], start), rtol=2e-6, atol=2e-6)
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    assert addresses == [t.data_ptr() for t in states[0]]
    text = "".join(code)
    assert "fxopt.cached_attention" in text
    for tensor in states[0]:
        assert f"empty_strided_cpu({tuple(tensor.shape)}" not in text
