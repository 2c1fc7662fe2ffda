"""fxopt.Cache under Hugging Face's generate, against the original model with the oracle's cache."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.emit.cache import Cache
from fxopt.ir.errors import FxoptError
from fxopt.ir.ops import attend
from fxopt.kernels.decode_topk.reference import ranges
from fxopt.kernels.kv_attention import parse, state_bytes
from fxopt.kernels.kv_attention.layout import RANGES, split_state
from fxopt.kernels.kv_attention.mutating import gather
from tests.oracle import FakeQuantizedCache

LAYOUTS = ["", "k2v2g32r8s4", "0:k2v4g32r0s0|1:exact", "0:kf8vf8g32r8s4|1:k2vf8g32r0s0"]
KEPT = "0:k2v4g32r0s0+t64|1:exact+t96"
LAYERS, KV, DIM = 2, 2, 16


class Written(Cache):
    """Lets the original model run over a packed cache: the attention function writes it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states


class Bridge:
    """The model's attention, through `fxopt::cached_attention` where the cache is ours."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.mask: Tensor | None = None
        self.cache: Any = None
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True)

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.mask, self.cache = kwargs["attention_mask"], kwargs["past_key_values"]

    def attention(self, module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, **kwargs: Any) -> Any:
        layer = self.cache.layers[module.layer_idx]
        return attend(
            q, k, v, self.mask, state=layer.state, start=self.cache.start,
            scale=kwargs["scaling"], causal=True, layout=layer.layout,
        ), None  # fmt: skip

    def after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.cache.advance(kwargs["input_ids"].shape[1])


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV, head_dim=DIM,
        max_position_embeddings=512, initializer_range=0.3, eos_token_id=96, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    model = build()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def rewritten() -> Iterator[LlamaForCausalLM]:
    model = build()
    bridge = Bridge(model)
    AttentionInterface.register("fxopt_test_cache", bridge.attention)
    model.set_attn_implementation("fxopt_test_cache")
    yield model
    AttentionInterface._global_mapping.pop("fxopt_test_cache")


def make(layout: str, batch: int = 1, capacity: int = 200, cls: type[Cache] = Written) -> Cache:
    return cls.allocate([(KV, DIM, DIM, layout)] * LAYERS, batch, capacity, torch.float32)


def prompts(batch: int, length: int, left: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 96, (batch, length))
    mask = torch.ones_like(ids)
    if left:
        ids[0, :left], mask[0, :left] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


MODES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "greedy": (1, 0, {}),
    "padded": (3, 13, {}),
    "sampling": (2, 5, {"do_sample": True, "top_k": 20}),
    "beams": (2, 9, {"num_beams": 3}),
    "lookup": (1, 0, {"prompt_lookup_num_tokens": 3}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_the_oracles(
    original: LlamaForCausalLM, rewritten: LlamaForCausalLM, layout: str, mode: str
) -> None:
    batch, left, arguments = MODES[mode]
    batch_inputs = prompts(batch, 60, left)
    if mode == "lookup":
        batch_inputs["input_ids"] = batch_inputs["input_ids"][:, :20].repeat(1, 3)
    rows = batch * arguments.get("num_beams", 1)
    tokens = []
    caches = (
        FakeQuantizedCache(layout, LAYERS, batch_inputs["attention_mask"]),
        make(layout, rows, 160),
    )
    for model, cache in zip((original, rewritten), caches, strict=True):
        torch.manual_seed(1)
        tokens.append(
            model.generate(**batch_inputs, past_key_values=cache, max_new_tokens=45, **arguments)
        )
    assert torch.equal(*tokens)
    assert caches[1].get_seq_length() == caches[0].get_seq_length()


def test_packing_changes_tokens(original: LlamaForCausalLM) -> None:
    """So that the test above can tell a packed cache from an exact one."""
    batch = prompts(1, 60)
    exact = original.generate(**batch, max_new_tokens=45)
    cache = FakeQuantizedCache("k2v2g32r8s4", LAYERS, batch["attention_mask"])
    packed = original.generate(**batch, past_key_values=cache, max_new_tokens=45)
    assert not torch.equal(exact, packed)


def test_second_turn_continues(original: LlamaForCausalLM, rewritten: LlamaForCausalLM) -> None:
    first, layout = prompts(1, 50), "k4v2g32r8s4"
    tokens = []
    for model, cache in (
        (original, FakeQuantizedCache(layout, LAYERS)),
        (rewritten, make(layout, 1, 90)),
    ):
        torch.manual_seed(2)
        ids = model.generate(**first, past_key_values=cache, max_new_tokens=20)
        ids = torch.cat([ids, torch.arange(1, 31)[None]], 1)
        if isinstance(cache, Cache):
            cache.reserve(170)
        tokens.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=40
            )
        )
    assert torch.equal(*tokens)


def fill(
    cache: Cache, length: int, keys: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Append `length` random tokens to every layer; what was appended."""
    batch = cache.batch_size
    k = torch.randn(batch, KV, length, DIM) if keys is None else keys
    v = torch.randn(batch, KV, length, DIM)
    cache.require(length, mask)
    for layer in cache.layers:
        attend(
            torch.zeros(batch, KV, length, DIM), k, v, mask, state=layer.state, start=cache.start,
            scale=1.0, causal=True, layout=layer.layout,
        )  # fmt: skip
    cache.advance(length)
    return k, v


def contents(cache: Cache) -> list[Tensor]:
    """Every stored token of every layer in order, [B, h, length, D]."""
    found: list[Tensor] = []
    length = cache.get_seq_length()
    for layer in cache.layers:
        for _, fmt, part in split_state(parse(layer.layout), KV, layer.state):
            for side in ("key", "value"):
                if fmt is None:
                    found.append(part[side][:, :, :length].clone())
                else:
                    found.append(gather(part, side, fmt, length, torch.float32))
    return found


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", [*LAYOUTS, KEPT])
def test_batch_operations(layout: str) -> None:
    cache = make(layout, 3, 150)
    fill(cache, 110)
    before = contents(cache)
    addresses = [t.data_ptr() for state in cache.states for t in state]
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert equal(contents(cache), [t[order] for t in before])
    assert addresses == [t.data_ptr() for state in cache.states for t in state]
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    assert equal(contents(cache), [t[order].repeat_interleave(2, 0) for t in before])
    cache.batch_select_indices(torch.tensor([1, 4]))
    assert cache.batch_size == 2
    assert equal(contents(cache), [t[[2, 0]] for t in before])
    cache.batch_select_indices(torch.tensor([False, True]))
    assert equal(contents(cache), [t[[0]] for t in before])
    fill(cache, 40)
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("layout", [*LAYOUTS, "k4v16g64r40s2"])
@pytest.mark.parametrize("removed", [0, 3, 8, 40, 77, 107, 109, 110, 500])
def test_crop_forgets_the_newest(layout: str, removed: int) -> None:
    cache = make(layout, 2, 150)
    fill(cache, 110)
    before = contents(cache)
    cache.crop(-removed)
    left = max(0, 110 - removed)
    assert cache.get_seq_length() == int(cache.start) == left
    assert equal(contents(cache), [t[:, :, :left] for t in before])
    new, _ = fill(cache, 9)
    for tensor, old in zip(contents(cache), before, strict=True):
        assert torch.equal(tensor[:, :, :left], old[:, :, :left])
    if left + 9 < 32:
        heads = [h for _ in range(LAYERS) for h, _ in parse(layout).resolve(KV)]
        for tensor, found in zip(contents(cache)[::2], heads, strict=True):
            assert torch.equal(tensor[:, :, left:], new[:, list(found)])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_many_deep_crops_keep_short_blocks(layout: str) -> None:
    """Blocks that a crop cut keep their tokens, later ones start where they end."""
    cache = make(layout, 1, 140)
    fill(cache, 130)
    for length in (81, 55, 70, 33, 3, 44):
        if length < cache.get_seq_length():
            cache.crop(length - cache.get_seq_length())
        before, at = contents(cache), cache.get_seq_length()
        fill(cache, 130 - at)
        after = contents(cache)
        assert equal([t[:, :, : min(at, at // 32 * 32)] for t in after],
                     [t[:, :, : min(at, at // 32 * 32)] for t in before])  # fmt: skip
        for layer in cache.layers:
            for _, fmt, part in split_state(parse(layout), KV, layer.state):
                if fmt is not None:
                    starts = part["block_start"]
                    assert int(starts[-1]) == fmt.packed(130)
                    assert (starts.diff() >= 0).all()
                    assert (starts.diff() <= fmt.group).all()


@settings(max_examples=30)
@given(st.data())
def test_what_tells_tiles_apart_is_that_of_the_keys_whatever_was_done(data: st.DataObject) -> None:
    """The range of each channel in each whole tile of an exact class."""
    layout = "0:exact+t96|1:k4v4g32r8s4+t64"
    cache = make(layout, 2, 40)
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["fill", "crop", "reorder", "select", "fork"]))
        if action == "fill":
            more = data.draw(st.integers(1, 120))
            cache.reserve(cache.get_seq_length() + more)
            fill(cache, more)
        elif action == "crop":
            cache.crop(-data.draw(st.integers(0, cache.get_seq_length())))
        elif action == "fork":
            cache = cache.fork()
        else:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)))
            (cache.reorder_cache if action == "reorder" else cache.batch_select_indices)(rows)
    length = cache.get_seq_length()
    for layer in cache.layers:
        _, _, part = split_state(parse(layout), KV, layer.state)[0]
        for name, x in zip(RANGES, ranges(part["key"][:, :, :length]), strict=True):
            assert torch.equal(part[name][:, :, : x.shape[2]], x)


def test_positive_crop_is_a_length() -> None:
    cache = make("", 1)
    fill(cache, 60)
    cache.crop(100)
    assert cache.get_seq_length() == 60
    cache.crop(20)
    assert cache.get_seq_length() == 20
    cache.crop(torch.tensor(-3))  # type: ignore[arg-type]
    assert type(cache.get_seq_length()) is int
    assert cache.get_seq_length() == 17


@pytest.mark.parametrize("layout", [*LAYOUTS, KEPT])
def test_reset_reserve_and_fork(layout: str) -> None:
    cache = make(layout, 2, 100)
    fill(cache, 90)
    before = contents(cache)
    fork = cache.fork()
    cache.reserve(300)
    assert equal(contents(cache), before)
    assert cache.nbytes == LAYERS * state_bytes(parse(layout), 2, KV, DIM, DIM, 300, 4)
    fill(cache, 200)
    assert equal(contents(fork), before)
    assert fork.get_seq_length() == int(fork.start) == 90
    assert len({id(layer.length) for layer in fork.layers} | {id(fork.length)}) == 1
    cache.reset()
    assert cache.get_seq_length() == int(cache.start) == 0
    other = make(layout, 2, 300)
    torch.manual_seed(0)
    fill(cache, 120)
    torch.manual_seed(0)
    fill(other, 120)
    assert equal(contents(cache), contents(other))


def test_room_is_checked_before_it_is_used() -> None:
    cache = make("k4v4g32r8s4", 1, 100)
    fill(cache, 90)
    with pytest.raises(FxoptError, match=r"holds 90 of 100 tokens and 11 more.*reserve\(101\)"):
        cache.advance(11)
    with pytest.raises(FxoptError, match="reserve"):
        cache.require(20)
    assert cache.get_seq_length() == int(cache.start) == 90


def test_interface_of_transformers() -> None:
    cache = make("k4v4g32r8s4", 2, 100, Cache)
    assert isinstance(cache, fxopt.Cache)
    fill(cache, 7)
    assert cache.get_mask_sizes(3, 0) == (10, 0)
    assert cache.get_max_length() == 100
    assert cache.batch_size == 2
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.is_initialized
    assert cache.is_sliding == [False] * LAYERS
    assert cache.layouts == ["k4v4g32r8s4"] * LAYERS
    with pytest.raises(FxoptError, match="DynamicCache to other models"):
        cache.update(torch.zeros(2, KV, 1, DIM), torch.zeros(2, KV, 1, DIM), 0)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert equal(contents(twin), contents(cache))
        twin.crop(-1)
        assert {layer.get_seq_length() for layer in twin.layers} == {6}
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("pool_tokens", [None, 200])
def test_float8_caches_are_pickled(pool_tokens: int | None) -> None:
    layout = "0:kf8vf8g32r8s4|1:k4vf8g32r8s4"
    specs = [(KV, DIM, DIM, layout)] * LAYERS
    cache = Cache.allocate(specs, 2, 100, torch.bfloat16, pool_tokens=pool_tokens)
    for state in cache.states:
        for x in state:
            if x.dtype == torch.float8_e4m3fn:
                x.copy_(torch.randn(x.shape))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for mine, its in zip(cache.states, twin.states, strict=True):
            assert [x.dtype for x in mine] == [x.dtype for x in its]
            for x, y in zip(mine, its, strict=True):
                assert torch.equal(x.float(), y.float())
                assert x.data_ptr() != y.data_ptr()
        assert {"floats"}.isdisjoint(twin.layers[0].__dict__)
    assert any(x.dtype == torch.float8_e4m3fn for x in cache.states[0])  # the original's stay


def test_cache_of_inference_mode_continues_outside() -> None:
    with torch.inference_mode():
        cache = make("k4v4g32r8s4", 2, 100)
        fill(cache, 50)
        cache.reserve(150)
        cache.batch_repeat_interleave(2)
    fill(cache, 90)
    assert cache.get_seq_length() == 140
