"""Sampling one step ahead gives what Hugging Face's loop gives, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import LogitsProcessor, MaxTimeCriteria, StoppingCriteriaList

from fxopt.emit import ahead, generation
from tests.emit.test_packed_generation import PADDING, left_padded, pair, prompts

CAPACITY = 200
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.7}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the caches of calls that ran ahead, on any device."""
    found: list[int] = []

    def counted(*args: Any) -> Tensor:
        tokens = ahead.sample(*args)
        found.append(args[-1]["past_key_values"].get_seq_length())
        return tokens

    monkeypatch.setattr(ahead, "waits", lambda device: True)
    monkeypatch.setattr(generation, "sample", counted)
    return found


def both_ways(opt: Any, ids: Tensor, **options: Any) -> list[tuple[Any, ...]]:
    """Tokens, cache and next random number of Hugging Face's loop, and of ours."""
    found: list[tuple[Any, ...]] = []
    for theirs in (True, False):
        torch.manual_seed(5)
        cache = opt.make_cache(len(ids), CAPACITY)
        more = {"streamer": Streamer()} if theirs else {}
        tokens = opt.generate(ids, past_key_values=cache, pad_token_id=0, **more, **options)
        states = [t for state in cache.states for t in state]
        found.append((tokens, cache.get_seq_length(), states, torch.rand(())))
    return found


class Streamer:
    def put(self, tokens: Tensor) -> None: ...

    def end(self) -> None: ...


def agree(found: list[tuple[Any, ...]]) -> None:
    (tokens, length, states, number), (ours, our_length, our_states, our_number) = found
    assert torch.equal(tokens, ours)
    assert length == our_length
    assert torch.equal(number, our_number)
    for one, other in zip(states, our_states, strict=True):
        if one.dim() == 4 and one.shape[2] == CAPACITY:
            one, other = one[:, :, :length], other[:, :, :length]
        # a ring also holds what was taken back, past the newest token
        if one.dtype != torch.float32 or one.shape[2] == length:
            assert torch.equal(one, other)


@pytest.mark.parametrize("mode", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["exact", "k4v4"])
def test_rows_end_where_they_end(steps: list[int], kind: str, mode: dict[str, Any]) -> None:
    """Whichever step is the last, rows that ended before it are filled up, and no more comes."""
    opt: Any = pair("llama", kind, torch.float32)[1]
    ids = prompts(3, 60)
    whole = both_ways(opt, ids, max_new_tokens=40, min_new_tokens=40, **mode)[0][0][:, 60:]
    widths: set[int] = set()
    for last in range(0, 40, 3):
        ends = whole[:, last].unique().tolist()
        found = both_ways(opt, ids, max_new_tokens=40, eos_token_id=ends, **mode)
        agree(found)
        widths.add(found[0][0].shape[1])
    assert len(widths) > 3
    assert len(steps) == 15


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_the_longest_sequence_ends_as_well(steps: list[int], tokens: int) -> None:
    opt: Any = pair("llama", "k4v4", torch.float32)[1]
    agree(both_ways(opt, prompts(2, 60), max_new_tokens=tokens, do_sample=False))
    assert steps == [60 + tokens - 1]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padded_rows_and_processors(steps: list[int], name: str) -> None:
    opt: Any = pair(name, "k4v4", torch.float32)[1]
    ids = prompts(3, 60)
    options = {"attention_mask": left_padded(ids, PADDING), "repetition_penalty": 1.3, **SAMPLED}
    agree(both_ways(opt, ids, max_new_tokens=25, min_new_tokens=4, eos_token_id=[7, 9], **options))
    assert len(steps) == 1


def test_a_conversation_goes_on(steps: list[int]) -> None:
    """The cache is left as if no step had been taken back: the next turn gives the same."""
    opt: Any = pair("llama", "k4v4", torch.float32)[1]
    found: list[Tensor] = []
    ends = list(range(40, 44))
    for theirs in (True, False):
        torch.manual_seed(5)
        cache, text = opt.make_cache(1, 300), prompts(1, 60)
        for _ in range(3):
            more = {"streamer": Streamer()} if theirs else {}
            text = opt.generate(
                text, past_key_values=cache, max_new_tokens=30, eos_token_id=ends, pad_token_id=0,
                do_sample=True, **more,
            )  # fmt: skip
            text = torch.cat([text, prompts(1, 9)], 1)
        found.append(text)
    assert torch.equal(*found)
    assert found[0].shape[1] < 60 + 3 * 39
    assert len(steps) == 3


class Own(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True}, {"streamer": Streamer()}, {"use_cache": False},
        {"logits_processor": [Own()]}, {"prefix_allowed_tokens_fn": lambda *_: [1, 2]},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(100.0)])},
    ],
    ids=["dict", "streamer", "no cache", "processor", "prefix", "criterion"],
)  # fmt: skip
def test_what_the_caller_would_notice_waits(steps: list[int], options: dict[str, Any]) -> None:
    opt: Any = pair("llama", "exact", torch.float32)[1]
    opt.generate(prompts(1, 10), max_new_tokens=3, do_sample=False, **options)
    assert steps == []


def test_a_cropped_cache_waits(steps: list[int]) -> None:
    """When it packs a block next is not known on the host."""
    opt: Any = pair("llama", "k4v4", torch.float32)[1]
    cache = opt.make_cache(1, 200)
    text = opt.generate(prompts(1, 60), past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert len(steps) == 1
    cache.crop(-5)
    opt.generate(text[:, :-3], past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert len(steps) == 1


def test_a_cpu_has_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "sample", lambda *_: pytest.fail("ran ahead"))
    opt: Any = pair("llama", "exact", torch.float32)[1]
    opt.generate(prompts(1, 10), max_new_tokens=3, do_sample=False)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exact", "k4v4"])
def test_nothing_between_two_steps_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the answer to the step before."""
    seen: list[int] = []

    class Watched(ahead._Ended):  # pyright: ignore[reportPrivateUsage]
        def __call__(self, last: Tensor) -> bool:
            # The first steps compile and are captured.
            torch.cuda.set_sync_debug_mode("error" if 4 <= self._steps < 60 else "default")
            seen.append(self._steps)
            return super().__call__(last)

    monkeypatch.setattr(ahead, "_Ended", Watched)
    opt: Any = copy.deepcopy(pair("llama", kind, torch.bfloat16)[1]).to("cuda")
    ids = prompts(2, 60).to("cuda")
    try:
        opt.generate(ids, max_new_tokens=80, min_new_tokens=80, eos_token_id=7, pad_token_id=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 80


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["exact", "k4v4"])
def test_rows_end_where_they_end_on_a_gpu(kind: str, mode: dict[str, Any]) -> None:
    opt: Any = copy.deepcopy(pair("llama", kind, torch.float32)[1]).to("cuda")
    ids = prompts(3, 60).to("cuda")
    whole = opt.generate(ids, max_new_tokens=40, do_sample=False)[:, 60:]
    for last in range(0, 40, 5):
        ends = whole[:, last].unique().tolist()
        found: list[tuple[Tensor, Tensor]] = []
        for theirs in (True, False):
            torch.manual_seed(5)
            more = {"streamer": Streamer()} if theirs else {}
            tokens = opt.generate(
                ids, max_new_tokens=40, eos_token_id=ends, pad_token_id=0, **more, **mode
            )
            found.append((tokens, torch.rand((), device="cuda")))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
