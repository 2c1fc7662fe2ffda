"""Block-sparse attention: lists of tiles, the reference, and the kernel that walks them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention.blocks import (
    TileLists,
    block_sparse,
    block_sparse_reference,
    lists_from_map,
    merge,
)
from fxopt.kernels.attention.reference import attention_with_lse
from fxopt.kernels.attention.spec import Attention, bind
from tests.kernels.window_lists import lists_of_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    queries: int, keys: int, dim: int = 16, kv: int = 2, group: int = 2, batch: int = 2,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Attention:  # fmt: skip
    q, k, v = (
        torch.randn(batch, n, h, dim, device=DEVICE).to(dtype).transpose(1, 2)
        for n, h in ((queries, kv * group), (keys, kv), (keys, kv))
    )
    given: dict[str, Any] = {
        "mask": None, "bias": None, "sinks": None, "scale": dim**-0.5, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0],
    }  # fmt: skip
    assert options.keys() <= given.keys()
    return bind(q, k, v, **given | options)


def draw(
    call: Attention, heads: int, query_tile: int, key_tile: int, density: float = 0.5
) -> tuple[TileLists, Tensor]:
    """Lists with rows that visit nothing, and what they let through, bool [B, H, N, T]."""
    batch, queries, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    shape = batch, heads, -(-queries // query_tile), -(-keys // key_tile)
    visited = torch.rand(shape, device=DEVICE) < density
    visited[0, 0, -1], visited[1, -1, 0] = True, False
    lists = lists_from_map(visited, queries, keys, call.causal, query_tile, key_tile)
    seen = visited.repeat_interleave(query_tile, 2).repeat_interleave(key_tile, 3)
    seen = seen[:, :, :queries, :keys].repeat_interleave(call.q.shape[1] // heads, 1)
    if call.causal:
        seen = seen & torch.ones(queries, keys, device=DEVICE).tril(keys - queries).bool()
    return lists, seen


def formula(call: Attention, seen: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, from a mask of all pairs."""
    group = call.group_size
    k, v = (t.double().repeat_interleave(group, 1) for t in (call.k, call.v))
    scores = call.q.double() @ k.mT * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        logit = call.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return (weights[..., : seen.shape[3]] @ v).transpose(1, 2), lse


def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], error: float) -> None:
    for mine, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=error, atol=error)


# Query and key lengths are odd, lists are of each head or shared.
CASES: list[tuple[dict[str, Any], int, int, int]] = [
    ({"queries": 101, "keys": 101, "dim": 64}, 4, 64, 32),
    ({"queries": 63, "keys": 101, "dim": 80, "kv": 1, "group": 3}, 1, 32, 64),
    ({"queries": 65, "keys": 130, "dim": 128, "causal": False, "softcap": 3.0}, 2, 64, 64),
    ({"queries": 101, "keys": 101, "sinks": torch.randn(4, device=DEVICE)}, 2, 64, 64),
]


@pytest.mark.parametrize(("options", "heads", "query_tile", "key_tile"), CASES)
def test_tiles_off_the_lists_are_not_seen(
    options: dict[str, Any], heads: int, query_tile: int, key_tile: int
) -> None:
    call = make(**options)
    lists, seen = draw(call, heads, query_tile, key_tile)
    expected = formula(call, seen)
    assert (expected[1] == -torch.inf).any() or call.sinks is not None
    check(block_sparse_reference(call, lists), expected, 2e-6)
    if AVAILABLE:
        check(kernel(call, lists), expected, 2e-6)


def kernel(call: Attention, lists: TileLists | None, **sizes: int) -> tuple[Tensor, Tensor]:
    from fxopt.kernels.attention.triton import attention_forward

    return attention_forward(call, lists, **sizes)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_kernel_through_tensor_descriptors() -> None:
    call = make(65, 70, 80, kv=1)
    lists, seen = draw(call, 2, 64, 64)
    # Tiles of the lists may hold several of the kernel's.
    out = kernel(call, lists, TMA=1, BLOCK_M=32, BLOCK_N=32)
    check(out, formula(call, seen), 2e-6)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
@pytest.mark.parametrize(("causal", "sink"), [(True, 5), (False, 0)])
def test_lists_of_a_window_give_the_window(causal: bool, sink: int) -> None:
    call = make(70, 100, batch=1, group=1, causal=causal, window=[30, 0], sink_tokens=[sink, 0])
    lists = lists_of_window(70, 100, call.window, call.sink_tokens, causal, 32, 16, DEVICE)
    assert int((lists.partial_count + lists.full_count)[0, 0].max()) <= (5 if causal else 6)
    expected = attention_with_lse(
        call.q.double(), call.k.double(), call.v.double(), None, None, None, call.scale,
        causal, call.window, 0.0, call.sink_tokens,
    )  # fmt: skip
    for actual in (block_sparse_reference(call, lists), kernel(call, lists), kernel(call, None)):
        check(actual, expected, 2e-6)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_padding_hides_keys_of_partial_tiles() -> None:
    mask = torch.ones(2, 70, device=DEVICE)
    mask[0, :40], mask[1, 20:30] = 0, 0
    call = make(70, 70, kv=1, group=1, mask=mask)
    partial = lists_from_map(
        torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE), 70, 70, False, 32, 32
    )
    # Without causality all tiles but the ragged ones are full: swap the lists.
    count = partial.partial_count + partial.full_count
    lists = TileLists(count, partial.full, torch.zeros_like(count), partial.full, 32, 32)
    lists.partial[..., 2] = 2
    seen = torch.ones(70, 70, device=DEVICE).tril().bool() & (mask != 0)[:, None, None]
    for actual in (block_sparse_reference(call, lists), kernel(call, lists), kernel(call, None)):
        check(actual, formula(call, seen), 2e-6)


def test_parts_merge_by_their_log_sum_exp() -> None:
    call = make(101, 101)
    whole = torch.rand(2, 4, 4, 4, device=DEVICE) < 0.6
    whole[0, :, 0] = False
    first = torch.rand(2, 4, 4, 4, device=DEVICE) < 0.5
    parts = [
        block_sparse_reference(call, lists_from_map(tiles, 101, 101, True, 32, 32))
        for tiles in (whole & first, whole & ~first)
    ]
    expected = block_sparse_reference(call, lists_from_map(whole, 101, 101, True, 32, 32))
    check(merge(parts), (expected[0].double(), expected[1].double()), 2e-6)


def test_full_tiles_are_those_that_no_mask_cuts() -> None:
    visited = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    lists = lists_from_map(visited, 70, 100, True, 32, 32, most=3)
    # Queries stand at 30 to 99; their tiles end at 61, 93 and 99.
    assert lists.full_count.tolist() == [[[0, 1, 2]]]
    assert lists.partial_count.tolist() == [[[2, 2, 2]]]
    assert lists.full[0, 0, 2, :2].tolist() == [0, 1]
    assert lists.partial[0, 0, :, :2].tolist() == [[0, 1], [1, 2], [2, 3]]
    by_range = lists_of_window(70, 100, [0], [0], True, 32, 32)
    assert by_range.full_count.equal(lists.full_count)
    assert by_range.partial_count.equal(lists.partial_count)


def test_lists_of_a_wide_window_need_no_square() -> None:
    lists = lists_of_window(2**20, 2**20, [4096], [64], True, 128, 128)
    assert lists.full.shape[3] <= 34
    assert int(lists.partial_count.max()) <= 3
    assert int(lists.full_count.max()) == 31


def test_misfits_are_named() -> None:
    call = make(101, 101)
    lists, _ = draw(call, 4, 64, 32)
    with pytest.raises(ValueError, match="do not serve 2 x 6 heads of 2 query tiles"):
        block_sparse(
            call.q.repeat(1, 3, 1, 1)[:, :6], call.k, call.v, lists, scale=1.0, causal=True
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("key_tile", [64, 128])
def test_long_inputs_on_the_device(dim: int, key_tile: int) -> None:
    call = make(1500, 1700, dim, dtype=torch.bfloat16)
    lists, seen = draw(call, 4, 128, key_tile, 0.3)
    expected = formula(call, seen)
    own = (block_sparse_reference(call, lists)[0].double() - expected[0]).abs().max()
    out, lse = block_sparse(call.q, call.k, call.v, lists, scale=call.scale, causal=True)
    assert (out.double() - expected[0]).abs().max() <= 8 * own
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-3, atol=1e-3)
