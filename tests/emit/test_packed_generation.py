"""What a rewritten model generates: the tokens of the original, whose cache is the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.capture import Captured, capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from fxopt.kernels.kv_attention.layout import parse, split_state
from fxopt.kernels.kv_attention.mutating import gather
from tests.oracle import FakeQuantizedCache

transformers = pytest.importorskip("transformers")

LAYERS, VOCAB = 2, 97
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96}
# Initialised wide, so that tokens depend on what the cache gives back.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.3, **SPECIAL,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, **SIZES}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}
LAYOUTS = {
    "exact": "",
    "k4v4": "k4v4g32r8s4",
    "k2v2": "k2v2g32r8s4",
    "float8": "kf8vf8g32r8s4",
    "mixed": "0:k2v4g32r0s0|1:exact",
    "kept": "0:k4v4g32r8s4+t32/5|1:exact+t32/3",
    "mixed of four": "0,2:k2v4g32r0s0|1:exact|3:k8v2g32r20s3",
}
PADDING = (0, 7, 25)  # within and beyond the first packed block
QUICK = [("llama", "exact"), ("llama", "mixed")]
EVERY = [
    (name, kind)
    for name in ("llama", "qwen3", "gemma3", "phi3", "gpt2", "neox")
    for kind in (
        "exact",
        "k4v4",
        "k2v2",
        "mixed" if name not in ("gpt2", "neox") else "mixed of four",
    )
]
EVERY.append(("llama", "float8"))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    match name:
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
        case "qwen3":
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED))
        case "phi3":
            return transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED))
        case "gemma3":
            layers = ["sliding_attention", "full_attention"]
            config = transformers.Gemma3TextConfig(sliding_window=24, layer_types=layers, **GROUPED)
            return transformers.Gemma3ForCausalLM(config)
        case "neox":
            return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))
        case _:
            config = transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=64, n_layer=LAYERS, n_head=4, n_positions=256,
                initializer_range=0.2, **SPECIAL,
            )  # fmt: skip
            return transformers.GPT2LMHeadModel(config)


@cache
def captured(name: str, dtype: torch.dtype) -> tuple[nn.Module, Captured]:
    model = build(name).eval().to(dtype)
    return model, capture(model, {"input_ids": torch.randint(1, VOCAB, (2, 11))})


@cache
def pair(name: str, kind: str, dtype: torch.dtype) -> tuple[nn.Module, OptimizedModule, str]:
    """The original, the module emitted with packed caches in all layers, and their layout."""
    model, found = captured(name, dtype)
    editor, layout = GraphEditor(found), LAYOUTS[kind]
    if layout:
        with editor.applying("kv_cache.blocks"):
            for site in found.sites:
                if site.family == "kv_cache" and site.head == 0:
                    editor.update(site, layout=layout)
    editor.finish()
    return model, emit(found, editor, model), layout


def prompts(rows: int = 3, length: int = 60, seed: int = 3) -> Tensor:
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, padding: tuple[int, ...] = PADDING) -> Tensor:
    mask = torch.ones_like(ids)
    for row, width in enumerate(padding):
        mask[row, :width] = 0
    return mask


def generated(
    module: Any, ids: Tensor, mask: Tensor, cache: Any = None, tokens: int = 20, **mode: Any
) -> Any:
    """Tokens, logits and cache. A second block is packed when 76 tokens are there."""
    torch.manual_seed(11)
    return module.generate(
        ids * mask, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens,
        min_new_tokens=tokens, output_logits=True, return_dict_in_generate=True, **mode,
    )  # fmt: skip


def check_tokens(name: str, kind: str, mode: str, padding: tuple[int, ...]) -> None:
    """In double precision, where no rounding is near a tie: logits and tokens are the oracle's."""
    model, opt, layout = pair(name, kind, torch.float64)
    ids = prompts()
    mask = left_padded(ids, padding)
    want = generated(model, ids, mask, FakeQuantizedCache(layout, LAYERS, mask), **MODES[mode])
    got = generated(opt, ids, mask, **MODES[mode])
    assert torch.equal(want.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits))


@pytest.mark.parametrize(("name", "kind"), QUICK)
@pytest.mark.parametrize("mode", ["beam sampling", "several samples"])
def test_tokens_are_the_oracles(name: str, kind: str, mode: str) -> None:
    check_tokens(name, kind, mode, PADDING)


def cases() -> Iterator[Any]:
    """Every mode with classes of heads, of two models; of others one, the rest where all run."""
    for name, kind in EVERY:
        for mode, padding in (("greedy", ()), *((mode, PADDING) for mode in MODES)):
            every = kind.startswith("mixed") and name in ("llama", "gpt2")
            more = not every and mode != "beams"
            marks = pytest.mark.exhaustive if more else pytest.mark.slow
            label = f"{name}-{kind}-{mode}{'' if padding else '-unpadded'}"
            yield pytest.param(name, kind, mode, padding, marks=marks, id=label)


@pytest.mark.parametrize(("name", "kind", "mode", "padding"), [*cases()])
def test_tokens_are_the_oracles_in_every_mode(
    name: str, kind: str, mode: str, padding: tuple[int, ...]
) -> None:
    check_tokens(name, kind, mode, padding)


def eager(model: Any) -> Any:
    """A copy that computes attention otherwise than the emitted module, and so rounds otherwise."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def equal_tokens(want: Any, got: Any) -> Tensor:
    """How many generated tokens of each row are the same up to the first that is not."""
    new = len(want.logits)
    same = want.sequences[:, -new:] == got.sequences[:, -new:]
    return same.long().cumprod(1).sum(1)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_in_half_precision_tokens_part_only_at_a_tie(name: str) -> None:
    """The same up to a position whose top two logits are nearer than four times the modules'."""
    model, opt, _ = pair(name, "exact", torch.bfloat16)
    ids = prompts(4)
    mask = left_padded(ids)
    original, precise = eager(model), copy.deepcopy(model).double()
    want, got = (generated(module, ids, mask, tokens=30) for module in (original, opt))
    whole = torch.cat([mask, mask.new_ones(4, 30)], 1)
    with torch.no_grad():
        exact = precise(input_ids=want.sequences, attention_mask=whole).logits[:, 59:-1]
    mine, its = (torch.stack(out.logits, 1).double() for out in (want, got))
    own = (mine - exact).abs().max()
    for row, count in enumerate(equal_tokens(want, got).tolist()):
        alike = slice(count + 1)  # logits of equal histories
        assert (its - exact)[row, alike].abs().max() <= 4 * own
        if count < 30:
            best, second = mine[row, count].topk(2).values
            assert best - second < 4 * (mine - its)[row, count].abs().max()


def held(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that a packed cache gives back, a layer: one format for all heads."""
    found: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        ((_, fmt, part),) = split_state(parse(layer.layout), layer.num_kv_heads, layer.state)
        length = cache.get_seq_length()
        keys, values = (gather(part, side, fmt, length, layer.dtype) for side in ("key", "value"))
        found.append((keys, values))
    return found


def exact_difference(original: Any, opt: Any, ids: Tensor, mask: Tensor, layout: str) -> float:
    """How far apart the keys and values of two modules are where nothing is packed yet."""
    cache = FakeQuantizedCache(layout, LAYERS, mask)
    with torch.no_grad():
        original(input_ids=ids * mask, attention_mask=mask, past_key_values=cache, use_cache=True)
        ours = held(opt(input_ids=ids * mask, attention_mask=mask, use_cache=True).past_key_values)
    pairs = [
        (mine, exact)
        for layer, both in zip(cache.layers, ours, strict=True)
        for mine, exact in zip(both, (layer.keys, layer.values), strict=True)
    ]
    return max((mine - exact)[:, :, 36:].abs().max().item() for mine, exact in pairs)


@pytest.mark.parametrize("seed", [3, 41, 47])
def test_in_single_precision_caches_part_only_where_a_number_is_on_a_tie(seed: int) -> None:
    """What rounding alone puts on the one or the other side of a level, or of a range's end. Only
    the first block that differs says so: what is computed after it has read it."""
    model, opt, layout = pair("phi3", "k2v2", torch.float32)
    original, ids = eager(model), prompts(seed=seed)
    mask = left_padded(ids)
    noise = 4 * exact_difference(original, opt, ids, mask, layout)
    assert noise < 1e-4
    cache = FakeQuantizedCache(layout, LAYERS, mask)
    want, got = generated(original, ids, mask, cache), generated(opt, ids, mask)
    for begin in (4, 36):
        span = slice(begin, begin + 32)
        seen = torch.cat([mask, mask.new_ones(3, 20)], 1)[:, None, span, None] != 0
        found = [
            ((image != mine)[:, :, span] & seen, ties[:, :, span])
            for layer, ours in zip(cache.layers, held(got.past_key_values), strict=True)
            for image, mine, ties in zip(layer.images, ours, layer.on_a_tie(noise), strict=True)
        ]
        if any(differs.any() for differs, _ in found):
            assert all(ties[differs].all() for differs, ties in found)
            assert all(ties.float().mean() < 0.05 for _, ties in found)
            return
    assert torch.equal(want.sequences, got.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-3, rtol=1e-3
    )


@pytest.mark.slow
def test_two_threads_generate_through_packed_caches_as_two_runs() -> None:
    _, opt, _ = pair("llama", "k2v2", torch.float64)
    jobs = [(prompts(1), ()), (prompts(3, 75), PADDING), (prompts(2, 90), ()), (prompts(2), (5,))]
    masks = [left_padded(ids, padding) for ids, padding in jobs]
    greedy = [
        partial(generated, opt, ids, mask, tokens=30)
        for (ids, _), mask in zip(jobs, masks, strict=True)
    ]
    alone = [run() for run in greedy]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = [job.result() for job in [pool.submit(run) for run in greedy]]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
