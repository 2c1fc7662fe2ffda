"""The text of a layout, and the bytes that it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.kernels.kv_attention.layout import (
    Blocks,
    Layout,
    allocate,
    empty_past,
    from_formats,
    parse,
    split_state,
    state_bytes,
    with_head,
    with_top_keys,
)

FORMATS = st.one_of(
    st.none(),
    st.builds(
        Blocks,
        st.sampled_from([16, 8, "f8", 4, 2]),
        st.sampled_from([8, "f8", 4, 2]),
        st.sampled_from([32, 64, 128]),
        st.integers(0, 200),
        st.integers(0, 9),
    ),
)


READS = st.sampled_from([(0, 1), (64, 1), (4096, 1), (4096, 8), (64, 20)])


@given(st.lists(st.tuples(FORMATS, READS), min_size=1, max_size=6))
def test_text_round_trip(heads: list[tuple[Blocks | None, tuple[int, int]]]) -> None:
    formats, reads = zip(*heads, strict=True)
    top_keys, refresh = zip(*reads, strict=True)
    layout = from_formats(formats, top_keys, refresh)
    assert parse(str(layout)) == layout
    assert parse(str(layout)).formats(len(formats)) == formats
    assert parse(str(layout)).top_keys(len(formats)) == top_keys
    assert parse(str(layout)).refresh(len(formats)) == refresh
    assert layout.keeps_choices == any(n > 1 for n in refresh)


@given(
    formats=st.lists(FORMATS, min_size=1, max_size=4),
    batch=st.integers(0, 3),
    length=st.integers(0, 700),
    dims=st.sampled_from([(64, 64), (80, 48), (8, 4)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_bytes_are_those_allocated(
    formats: list[Blocks | None],
    batch: int,
    length: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    layout, heads = from_formats(formats), len(formats)
    state = allocate(layout, batch, heads, *dims, length, dtype, "meta")
    told = state_bytes(layout, batch, heads, *dims, length, dtype.itemsize)
    starts = sum(tensor.nbytes for tensor in state if tensor.dtype == torch.int64)
    assert told == sum(tensor.nbytes for tensor in state)
    assert starts <= 8 * heads * (length // 32 + 1)


def test_bytes_by_hand() -> None:
    """4-bit K and V, 2 heads of 64, 1,000 tokens: 14 blocks of 64, a ring of 127, a sink of 4."""
    blocks, ring = (1000 - 4 - 64) // 64, 64 + 64 - 1
    packed = 2 * blocks * (2 * 64 * 32 + 2 * 2 * 64 + 2 * 2 * 64)
    exact = 2 * (ring + 4) * 2 * 64 * 2
    told = state_bytes(parse("k4v4g64r64s4"), 1, 2, 64, 64, 1000, 2)
    assert told == packed + exact + 8 * (blocks + 1)
    assert state_bytes(parse(""), 1, 2, 64, 64, 1000, 2) == 2 * 2 * 1000 * 64 * 2
    # e4m3: a scale and a zero for each channel of the keys, a scale for each token of the values
    packed = 2 * blocks * (2 * 64 * 64 + 2 * 2 * 64 + 2 * 64)
    told = state_bytes(parse("kf8vf8g64r64s4"), 1, 2, 64, 64, 1000, 2)
    assert told == packed + exact + 8 * (blocks + 1)


def test_canonical_texts() -> None:
    assert parse("") == Layout() == parse("exact")
    assert str(from_formats([None, None])) == ""
    assert str(from_formats([Blocks(4, 2, 64, 0, 4)] * 3)) == "k4v2g64r0s4"
    text = with_head("", 1, Blocks(4, 4, 64, 64, 4), 3)
    assert text == "0,2:exact|1:k4v4g64r64s4"
    assert with_head(text, 1, None, 3) == ""
    text = with_top_keys(text, 2, 512, 3)
    assert text == "0:exact|1:k4v4g64r64s4|2:exact+t512"
    assert with_head(text, 2, Blocks(4, 4, 64, 64, 4), 3) == (
        "0:exact|1:k4v4g64r64s4|2:k4v4g64r64s4+t512"
    )
    text = with_top_keys(text, 0, 512, 3, 8)
    assert text == "0:exact+t512/8|1:k4v4g64r64s4|2:exact+t512"
    assert with_head(text, 0, Blocks(4, 4, 64, 64, 4), 3) == (
        "0:k4v4g64r64s4+t512/8|1:k4v4g64r64s4|2:exact+t512"
    )
    assert parse("k16v16g64r0s0").exact


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kf4v4g64r0s0", "no cache format"),
        ("k3v4g64r0s0", "K bits must be one of"),
        ("k4v4g48r0s0", "group must be one of"),
        ("k4v4", "no cache format"),
        ("a:exact", "no list of KV heads"),
        ("k4v4g64r-1s0", "no cache format"),
        ("exact+t64/", "'' in layout 'exact\\+t64/' is no number of tokens"),
        ("exact+t/8", "is no number of tokens"),
        ("exact+t64/0", "keeps a choice for 0 tokens"),
        ("exact+t0/8", "keeps a choice for 0 tokens"),
    ],
)
def test_unreadable_text_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)


def test_heads_and_channels_are_checked() -> None:
    with pytest.raises(ValueError, match=r"names KV heads \[0, 0\], the layer has 2"):
        parse("0:exact|0:k4v4g64r0s0").resolve(2)
    with pytest.raises(ValueError, match="2-bit K needs channels divisible by 4, got 6"):
        allocate(parse("k2v4g64r0s0"), 1, 1, 6, 6, 100, torch.float32)
    with pytest.raises(ValueError, match="tiles are chosen by the scales of packed keys"):
        allocate(parse("k16v4g64r0s0+t512"), 1, 1, 8, 8, 100, torch.float32)
    assert Blocks(16, 4, 64, 0, 0).refusal(7) is None
    assert Blocks("f8", 4, 64, 0, 0).refusal(7) is None
    with pytest.raises(ValueError, match="needs a state of 2 tensors, got 1"):
        split_state(parse(""), 2, [torch.zeros(1)])


@given(st.integers(0, 2000), FORMATS)
def test_schedule(length: int, fmt: Blocks | None) -> None:
    """What is exact besides the sink is never shorter than the residual nor a group longer."""
    if fmt is None:
        return
    packed = fmt.packed(length)
    rest = length - fmt.sink - packed
    assert packed % fmt.group == 0
    assert packed <= fmt.packed(length + 1) <= packed + fmt.group
    assert rest < fmt.residual + fmt.group
    assert not packed or rest >= fmt.residual


def test_empty_past_has_nothing() -> None:
    past = empty_past(parse("0:k4v8g32r3s2|1:exact"), 3, 2, 8, 16, torch.float16)
    assert all(tensor.shape[2] == 0 and tensor.shape[0] == 3 for tensor in past)
    assert len(past) == 10 + 2
