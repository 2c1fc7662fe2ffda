"""`generate` over the emitted graph: the tokens of the original in every mode."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from fxopt.emit.cache import Cache
from fxopt.ir.errors import FxoptError

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
}


def prompts(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(4))


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompts(3, 10)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 7)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return ids, mask


def both(case, name, ids, mask=None, **options):
    """Token ids that the original and the emitted module generate under the same seed."""
    found = case(name)
    results = []
    for module in (found.model, found.emit()):
        torch.manual_seed(11)
        mask_now = torch.ones_like(ids) if mask is None else mask
        options = {"max_new_tokens": 12, **options}
        results.append(module.generate(ids, attention_mask=mask_now, **options))
    return results


@pytest.mark.parametrize("mode", MODES)
def test_llama_generates_the_originals_tokens(case, mode):
    ids = prompts(1 if mode == "prompt lookup" else 2)
    want, got = both(case, "llama", ids, **MODES[mode])
    assert torch.equal(want, got)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling"])
def test_others_generate_the_originals_tokens(case, name, mode):
    want, got = both(case, name, prompts(), **MODES[mode])
    assert torch.equal(want, got)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_left_padding(case, name):
    ids, mask = left_padded()
    want, got = both(case, name, ids, mask)
    assert torch.equal(want, got)


def test_stops_at_eos_and_pads_the_rest(case):
    found = case("llama")
    ids = prompts(3)
    free = found.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    eos = int(free[1, ids.shape[1] + 3])
    want, got = both(case, "llama", ids, eos_token_id=eos)
    assert torch.equal(want, got)
    assert (want[1, ids.shape[1] + 4 :] == 0).all()


def test_a_conversation_continues_from_its_cache(case):
    found = case("llama")
    ids = prompts()
    answers = []
    for module in (found.model, found.emit()):
        options = {"max_new_tokens": 5, "return_dict_in_generate": True}
        first = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        follow = torch.cat([first.sequences, prompts(2, 4)], 1)
        second = module.generate(
            follow,
            attention_mask=torch.ones_like(follow),
            past_key_values=first.past_key_values,
            **options,
        )
        answers.append(second.sequences)
        # what is in the cache is not read again
        assert second.past_key_values.get_seq_length() == second.sequences.shape[1] - 1
    assert torch.equal(*answers)


def test_token_by_token_equals_one_pass(case):
    opt = case("llama").emit()
    ids = prompts()
    with torch.no_grad():
        whole = opt(input_ids=ids).logits
        cache = opt.make_cache(2, 4)
        pieces = [
            opt(input_ids=part, past_key_values=cache).logits for part in ids.split([3, 1, 4, 1], 1)
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 9


def test_logits_to_keep_and_labels_as_the_original(case):
    found = case("llama")
    opt, ids = found.emit(), prompts()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    with torch.no_grad():
        want, got = (m(input_ids=ids, labels=labels) for m in (found.model, opt))
        assert torch.equal(want.loss, got.loss)
        assert torch.equal(want.logits, got.logits)
        last = opt(input_ids=ids, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last, want.logits[:, -1:])


def test_gradients_are_the_originals(case):
    found = case("llama")
    model, ids = copy.deepcopy(found.model), prompts()
    opt = found._replace(model=model).emit()
    gradients = []
    for module in (model, opt):
        model.zero_grad()
        module(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_a_plain_call_returns_a_cache_only_when_asked(case):
    opt, ids = case("llama").emit(), prompts()
    with torch.no_grad():
        assert opt(ids).past_key_values is None
        assert isinstance(opt(ids, use_cache=True).past_key_values, Cache)
        assert isinstance(opt(ids, return_dict=False), tuple)


def test_foreign_caches_are_one_error(case):
    from transformers import DynamicCache

    found = case("llama")
    with pytest.raises(FxoptError, match=r"past_key_values.*fxopt\.Cache.*DynamicCache"):
        found.emit()(input_ids=prompts(), past_key_values=DynamicCache())


def test_a_mask_of_the_wrong_width_is_an_error(case):
    opt = case("llama").emit()
    with pytest.raises(FxoptError, match="attention_mask: it has 8 columns"):
        opt(input_ids=prompts(), attention_mask=torch.ones(2, 8))


def test_two_threads_generate_as_two_runs(case):
    opt = case("llama").emit()
    batches = [prompts(1, 7), prompts(2, 12)]
    alone = [opt.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)
             for ids in batches]  # fmt: skip
    together = [None, None]

    def work(place: int) -> None:
        ids = batches[place]
        together[place] = opt.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_forward_does_not_walk_through_the_parameters(case, monkeypatch):
    """Which would take the longer the more layers there are."""
    opt = case("llama").emit()
    walked = []

    def parameters(module, recurse=True):
        for name, found in module.named_parameters(recurse=recurse):
            walked.append(name)
            yield found

    monkeypatch.setattr(type(opt), "parameters", parameters)
    with torch.no_grad():
        opt(prompts(), use_cache=True)
    assert walked
    assert len(set(walked)) == 1, "only the first says where the module lies"
