"""Caches whose packed blocks lie on pages: what they hold and generate is what one with blocks
side by side does, and every page is free or in use."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.emit.cache import Cache
from fxopt.emit.cache_layers import CacheLayer
from fxopt.emit.growing import grown_states
from fxopt.ir.errors import FxoptError
from fxopt.ir.ops import attend
from fxopt.kernels.kv_attention import parse
from fxopt.kernels.kv_attention.layout import split_state
from fxopt.kernels.kv_attention.pages import HIDDEN

pytest.importorskip("transformers")

from tests.emit.test_cache import DIM, KV, contents, equal, fill
from tests.emit.test_packed_generation import generated, left_padded, pair, prompts

# Three schedules, one of them in both layers.
LAYOUTS = ["0:k2v4g32r0s0|1:exact", "0:kf8vf8g32r8s4+t64|1:k4v16g32r0s0"]


def make(
    pool_tokens: int | None, batch: int = 2, capacity: int = 150, layouts: Sequence[str] = LAYOUTS
) -> Cache:
    specs = [(KV, DIM, DIM, layout) for layout in layouts]
    return Cache.allocate(specs, batch, capacity, torch.float32, pool_tokens=pool_tokens)


def states(cache: Cache) -> list[tuple[Any, dict[str, Tensor]]]:
    """(format, tensors) of each packed class of each layer."""
    return [
        (fmt, part)
        for layer in cache.layers
        for _, fmt, part in split_state(parse(layer.layout), KV, layer.state)
        if fmt is not None
    ]


def assert_consistent(cache: Cache) -> None:
    assert cache.pool is not None
    for fmt, part in states(cache):
        table = cache.pool.tables[fmt.group, fmt.residual, fmt.sink]
        assert part["table"] is table.table
        assert part["table"].shape == (cache.batch_size, len(part["block_start"]) - 1)
        used = int((part["block_start"].diff() > 0).sum())
        assert part["block_start"][1 : used + 1].tolist() == table.ends
        assert part["table"][:, :used].tolist() == [row[:used] for row in table.rows]
        held = Counter(page for row in table.rows for page in row if page != HIDDEN)
        assert held == Counter({p: n for p, n in enumerate(table.users) if n and p != HIDDEN})
        assert sorted([*held, *table.free]) == list(range(1, len(part["key"])))


def both(caches: Sequence[Cache], more: int, mask: Tensor | None = None) -> None:
    """The same tokens in each."""
    seed = int(torch.randint(2**31, ()))
    for cache in caches:
        torch.manual_seed(seed)
        fill(cache, more, mask=mask)


def test_what_is_stored_is_the_same() -> None:
    caches = make(300), make(None)
    for more in (90, 1, 1, 40, 18):
        both(caches, more)
        assert equal(*map(contents, caches))
        assert_consistent(caches[0])
    assert caches[1].free_tokens is None
    assert max(table.ends[-1] for table in caches[0].pool.tables.values()) == 128  # type: ignore[union-attr]


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_done(data: st.DataObject) -> None:
    caches = [make(4000, capacity=40), make(None, capacity=40)]
    for _ in range(data.draw(st.integers(1, 8))):
        length, rows = caches[0].get_seq_length(), caches[0].batch_size
        kinds = ["fill", "fill", "crop", "reorder", "select", "repeat", "fork", "reset"]
        action = data.draw(st.sampled_from(kinds))
        if action == "fill":
            more = data.draw(st.integers(1, 120))
            for cache in caches:
                cache.reserve(length + more)
            both(caches, more)
        elif action == "crop":
            removed = data.draw(st.integers(0, length))
            for cache in caches:
                cache.crop(-removed)
        elif action == "fork":
            caches = [cache.fork() for cache in caches]
        elif action == "reset":
            for cache in caches:
                cache.reset()
        elif action == "repeat":
            if rows < 4:
                for cache in caches:
                    cache.batch_repeat_interleave(2)
        else:
            size = rows if action == "reorder" else data.draw(st.integers(1, 3))
            places = st.lists(st.integers(0, rows - 1), min_size=size, max_size=size)
            index = torch.tensor(data.draw(places))
            for cache in caches:
                (cache.reorder_cache if action == "reorder" else cache.batch_select_indices)(index)
        assert_consistent(caches[0])
        assert equal(*map(contents, caches))


def test_copies_have_tables_of_their_own() -> None:
    cache = make(400, layouts=["k4v4g32r8s4", "k2v2g32r8s4"])
    fill(cache, 90)
    for copied in (Cache.fork, lambda cache: pickle.loads(pickle.dumps(cache))):
        twin = copied(cache)
        before = contents(twin)
        assert equal(before, contents(cache))
        fill(cache, 30)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert equal(contents(twin), before)
        assert_consistent(twin)
        cache.crop(-30)


def test_an_exhausted_pool_is_an_error_before_anything_is_written() -> None:
    cache = make(150, layouts=["k4v4g32r8s4"])  # 150 // 32 + 2 pages
    fill(cache, 80)
    assert cache.free_tokens == 2 * 32
    fill(cache, 28)
    assert cache.free_tokens == 0
    before, tables = contents(cache), [part["table"].clone() for _, part in states(cache)]
    message = "2 more pages of 32 tokens are needed for 140 tokens in each of 2 rows, and of 6 in"
    with pytest.raises(FxoptError, match=message):
        fill(cache, 32)
    assert cache.get_seq_length() == int(cache.start) == 108
    assert equal(contents(cache), before)
    assert equal(tables, [part["table"] for _, part in states(cache)])
    cache.crop(-50)
    assert cache.free_tokens == 2 * 32
    fill(cache, 45)
    # The row that is left takes what the other gave back.
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.free_tokens == 2 * 32 + 32
    fill(cache, 40)
    assert_consistent(cache)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 90)])
def test_a_call_that_failed_may_come_again_with_another_mask(mask: Tensor | None) -> None:
    """What it would have hidden has pages now."""
    caches = [make(tokens, layouts=["k4v4g32r0s0"]) for tokens in (200, None)]
    failed = torch.ones(2, 90)
    failed[1, :70] = 0
    caches[0].require(90, failed)
    both(caches, 90, mask)
    assert equal(*map(contents, caches))
    assert_consistent(caches[0])


def test_a_call_that_failed_half_way_finds_its_pages_again() -> None:
    """Layers that have packed them do not do it twice."""
    caches = [make(tokens, layouts=["k4v4g32r0s0"] * 2) for tokens in (200, None)]
    k, v = torch.randn(2, 2, KV, 90, DIM)
    for cache in caches:
        for layers in (cache.layers[:1], cache.layers):
            cache.require(90, torch.ones(2, 90))
            for layer in layers:
                attend(
                    k, k, v, None, state=layer.state, start=cache.start, scale=1.0, causal=True,
                    layout=layer.layout,
                )  # fmt: skip
        cache.advance(90)
    assert equal(*map(contents, caches))
    assert_consistent(caches[0])


@pytest.mark.parametrize("change", [Cache.reorder_cache, Cache.batch_select_indices])
def test_rows_share_no_page_that_is_still_to_be_written(change: Any) -> None:
    caches = [make(tokens, layouts=["k4v4g32r0s0"]) for tokens in (300, None)]
    both(caches, 40)
    caches[0].require(60)  # a call that fails
    for cache in caches:
        change(cache, torch.tensor([1, 1]))
    both(caches, 60)
    assert equal(*map(contents, caches))
    assert_consistent(caches[0])


def test_a_call_without_a_mask_hides_nothing() -> None:
    """Blocks that it packs have pages of their own, though all tokens of a row were hidden."""
    caches = [make(tokens, capacity=190, layouts=["k4v4g32r70s0"]) for tokens in (400, None)]
    mask = torch.ones(2, 120)
    mask[1] = 0
    both(caches, 120, mask)
    both(caches, 60)
    assert equal(*map(contents, caches))
    assert_consistent(caches[0])


def test_a_refused_call_takes_pages_of_no_schedule() -> None:
    cache = make(128, layouts=["0:k4v4g64r0s0|1:k4v4g32r70s0", "k4v4g32r0s0"])
    fill(cache, 100)
    assert cache.pool is not None
    free = {key: list(table.free) for key, table in cache.pool.tables.items()}
    with pytest.raises(FxoptError, match="more pages of 32 tokens"):
        cache.require(30)
    assert {key: table.free for key, table in cache.pool.tables.items()} == free
    assert_consistent(cache)


def test_blocks_without_pages_are_an_error() -> None:
    cache = make(300)
    with pytest.raises(FxoptError, match=r"before they had pages; call cache\.require"):
        cache.advance(90)
    assert cache.get_seq_length() == int(cache.start) == 0


@pytest.mark.parametrize("change", [Cache.reorder_cache, Cache.batch_select_indices])
def test_rows_that_are_not_there_leave_the_cache_as_it_was(change: Any) -> None:
    cache = make(300)
    fill(cache, 90)
    before = contents(cache)
    for wrong in ([-1, 0], [0, 2]):
        with pytest.raises(IndexError):
            change(cache, torch.tensor(wrong))
    assert equal(contents(cache), before)
    assert_consistent(cache)


def test_layers_that_could_not_grow_read_the_tables_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where memory ran out half-way, a cache goes on with the capacity that it had."""
    cache, plain = (
        make(tokens, capacity=100, layouts=["k4v4g32r0s0"] * 2) for tokens in (400, None)
    )
    both([cache, plain], 40)
    version, grow = cache.length.version, CacheLayer.reserve

    def reserve(layer: CacheLayer, capacity: int) -> None:
        if layer is cache.layers[1]:
            raise torch.OutOfMemoryError("of this test")
        grow(layer, capacity)

    monkeypatch.setattr(CacheLayer, "reserve", reserve)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(300)
    assert cache.capacity == 100
    assert cache.length.version > version
    both([cache, plain], 60)
    assert equal(*map(contents, [cache, plain]))
    assert_consistent(cache)


def test_a_pool_of_exact_heads_is_refused() -> None:
    with pytest.raises(FxoptError, match="pool_tokens: this plan stores all keys and values exac"):
        make(100, layouts=["", "exact+t96"])


def test_rows_that_go_on_from_the_same_tokens_share_pages() -> None:
    """A prompt is stored once for all that continue it, and beams keep what they have in common."""
    cache = make(128, batch=1, layouts=["k4v4g32r0s0"])
    fill(cache, 100)
    assert cache.free_tokens == 128 + 32 - 96
    cache.batch_repeat_interleave(2)
    assert cache.free_tokens == 128 + 32 - 96
    before = contents(cache)
    fill(cache, 28)
    assert cache.free_tokens == 0
    after = contents(cache)
    assert equal([x[:, :, :96] for x in after], [x[:, :, :96] for x in before])
    assert not torch.equal(after[0][0, :, 100:], after[0][1, :, 100:])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.free_tokens == 32
    assert equal(contents(cache), [x[[1, 1]] for x in after])
    assert_consistent(cache)


@pytest.mark.parametrize("chunks", [[140], [20, 70, 50]])
def test_padding_takes_no_pages(chunks: list[int]) -> None:
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[1, :67] = 0
    mask[2, :140] = 0
    caches = [make(tokens, batch=3, layouts=["k4v4g32r0s4"]) for tokens in (300, None)]
    done = 0
    for more in [*chunks, 1, 9]:
        done += more
        both(caches, more, mask[:, :done])
        assert equal(*map(contents, caches))
        assert_consistent(caches[0])
    assert caches[0].pool is not None
    # Rows that have begun are not asked for again.
    caches[0].require(0, torch.zeros(3, 150))
    assert caches[0].pool.padding == [0, 67, 140]
    (table,) = caches[0].pool.tables.values()
    # Blocks begin at 4, 36, 68 and 100; the last row's first tokens are not packed yet.
    assert [sum(page != HIDDEN for page in row) for row in table.rows] == [4, 3, 0]
    caches[0].reset()
    both([caches[0]], 100)
    assert HIDDEN not in table.rows[2]


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
    st.sampled_from(["k4v4g32r8s4", "k4v4g64r0s0", "k2v2g32r40s9"]),
)
def test_so_many_tokens_always_fit(padding: list[int], layout: str) -> None:
    """Of all rows together, however they are divided and come."""
    mask = torch.ones(len(padding), 300, dtype=torch.long)
    for row, width in zip(mask, padding, strict=True):
        row[:width] = 0
    specs = [(1, 8, 8, layout)]
    tokens = int(mask.sum())
    cache = Cache.allocate(specs, len(padding), 300, torch.float32, "meta", pool_tokens=tokens)
    for length in (170, 171, 300):
        cache.require(length - cache.get_seq_length(), mask[:, :length])
        cache.advance(length - cache.get_seq_length())
    assert cache.free_tokens is not None


def test_pages_are_taken_without_new_tensors() -> None:
    """So that a captured step goes on: what it reads stays where it is."""
    cache = make(400)
    fill(cache, 40)
    held = [t.data_ptr() for state in cache.states for t in state]
    version = cache.length.version
    for more in (30, 1, 50):
        fill(cache, more)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-9)
    fill(cache, 9)
    assert held == [t.data_ptr() for state in cache.states for t in state]
    assert version == cache.length.version
    cache.reserve(900)
    assert version < cache.length.version
    assert_consistent(cache)


def test_bytes_are_those_of_the_pool() -> None:
    packed = Cache.allocate(
        [(KV, DIM, DIM, "k4v4g32r8s4")] * 2, 4, 1000, torch.float32, pool_tokens=1000
    )
    tables = {id(part["table"]): part["table"].nbytes for _, part in states(packed)}
    assert list(tables.values()) == [4 * 4 * 30]
    pages = 1000 // 32 + 4 + 1
    page = KV * (2 * 32 * DIM // 2 + 2 * 2 * (DIM + 32))
    exact = 4 * KV * (4 + 39) * 2 * DIM * 4
    assert packed.nbytes == 4 * 4 * 30 + 2 * (pages * page + exact + 8 * 31)


@pytest.mark.parametrize("kind", ["k2v2", "mixed", "float8"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_tokens_are_those_of_blocks_side_by_side(kind: str, mode: dict[str, Any]) -> None:
    _, opt, _ = pair("llama", kind, torch.float64)
    lookup = "prompt_lookup_num_tokens" in mode
    ids = prompts(1, 20).repeat(1, 3) if lookup else prompts()
    mask = left_padded(ids, () if lookup else (0, 7, 50))
    rows = len(ids) * mode.get("num_beams", 1)
    # Without a residual what is taken back leaves short blocks, each on a page.
    tokens = (4 if lookup else 1) * rows * 110
    caches: list[Any] = [
        opt.make_cache(rows, 110, pool_tokens=tokens),  # type: ignore[operator]
        opt.make_cache(rows, 110),  # type: ignore[operator]
    ]
    paged, plain = (generated(opt, ids, mask, cache, tokens=45, **mode) for cache in caches)
    assert torch.equal(paged.sequences, plain.sequences)
    for one, other in zip(paged.logits, plain.logits, strict=True):
        assert torch.equal(one, other)
    assert max(table.ends[-1] for table in caches[0].pool.tables.values()) >= 64
    if not mode:
        assert [HIDDEN in row for row in next(iter(caches[0].pool.tables.values())).rows] == [
            False, False, True,
        ]  # fmt: skip


def test_a_call_that_finds_no_page_is_refused() -> None:
    _, opt, _ = pair("llama", "k4v4", torch.float64)
    cache = opt.make_cache(3, 110, pool_tokens=60)  # type: ignore[operator]
    with pytest.raises(FxoptError, match=r"make a larger pool \(make_cache\(batch, capacity, pool"):
        opt(prompts(3, 100), past_key_values=cache)
    assert cache.get_seq_length() == 0
    opt(prompts(3, 60), past_key_values=cache)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("shape", [(2, 30), (2, 1, 40, 40), (1, 40)])
def test_a_mask_of_another_shape_is_the_models_to_judge(shape: tuple[int, ...]) -> None:
    _, opt, _ = pair("llama", "k4v4", torch.float64)
    ids, mask = prompts(2, 40), torch.ones(shape)
    mask[..., :5] = 0
    found: list[Any] = []
    for pool_tokens in (200, None):
        cache = opt.make_cache(2, 110, pool_tokens=pool_tokens)  # type: ignore[operator]
        try:
            found.append(opt(ids, attention_mask=mask, past_key_values=cache).logits.tolist())
        except FxoptError as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert (shape == (1, 40)) == (type(found[0]) is list)


def test_an_export_reads_the_same_state() -> None:
    _, opt, _ = pair("llama", "mixed", torch.float64)
    found: list[list[Tensor]] = []
    for pool_tokens in (200, None):
        cache = opt.make_cache(2, 110, pool_tokens=pool_tokens)  # type: ignore[operator]
        opt(prompts(2, 100), past_key_values=cache)
        found.append(grown_states(opt.program, cache))
    assert equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
def test_replayed_steps_go_through_the_table(mode: dict[str, Any]) -> None:
    _, found, _ = pair("llama", "k4v4", torch.float32)
    opt: Any = found.to("cuda")
    ids, rows = prompts().to("cuda"), 3 * mode.get("num_beams", 1)
    mask = left_padded(ids, (0, 7, 50))
    caches = [opt.make_cache(rows, 190, pool_tokens=rows * 190), opt.make_cache(rows, 190)]
    paged, plain = (generated(opt, ids, mask, cache, tokens=120, **mode) for cache in caches)
    assert torch.equal(paged.sequences, plain.sequences)
    for one, other in zip(paged.logits, plain.logits, strict=True):
        assert torch.equal(one, other)
