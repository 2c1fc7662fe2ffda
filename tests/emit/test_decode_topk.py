"""A causal LM whose decoded tokens read some tiles, against Hugging Face's own attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.kernels.decode_topk.reference import TILE, kept_keys, kept_tiles, ranges
from tests.emit.onnx_cases import everywhere, llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

PROMPT, NEW, TOP = 1500, 4, 1024


class Case:
    """`opt` reads 1,024 keys in all four heads of two layers, chosen for `refresh` tokens; `masked`
    says what that is."""

    def __init__(self, refresh: int) -> None:
        self.refresh, self.chosen = refresh, dict[int, tuple[Tensor, Tensor, int]]()
        self.label = f"top{TOP}" if refresh == 1 else f"top{TOP}/{refresh}"
        self.model, example = llama(2)
        for module in self.model.modules():
            if hasattr(module, "q_proj"):
                module.q_proj.weight.data *= 3  # sharper attention
        # A past that is long enough for all numbers is one for keeping them.
        work = fxopt.Generate(batch=1, prompt=2200 if refresh == 1 else 30_000, new_tokens=90)
        self.opt, chosen = everywhere(
            "attention.decode_topk", self.model, example, self.label, workload=work
        )
        assert [proposal.candidate.label for proposal in chosen] == [self.label] * 4
        self.masked: Any = copy.deepcopy(self.model)
        self.masked.config._attn_implementation = "some_tiles"
        self.ids = torch.randint(3, 97, (2, PROMPT + NEW))

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        """A single query after a past reads some of it; several queries see all before them."""
        group, keys, queries = module.num_key_value_groups, k.shape[2], q.shape[2]
        seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
        if queries > 1:
            self.chosen.pop(module.layer_idx, None)
        elif keys > 1:
            kept, whole, position = self.chosen.get(module.layer_idx, (q, q, -self.refresh))
            if keys - 1 >= position + self.refresh:
                whole = torch.tensor([(keys - 1) // TILE])
                kept = kept_tiles(q, *ranges(k), None, whole, TOP, TILE, module.scaling)
                self.chosen[module.layer_idx] = kept, whole, keys - 1
            seen = kept_keys(kept, whole, keys, 0, TILE).repeat_interleave(group, 1)
            self.left_out = int((~seen).sum(-1).min())
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = (q @ k.mT * module.scaling).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module", params=[1, 8])
def kept(request: Any) -> Iterator[Case]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    case = Case(request.param)
    ALL_ATTENTION_FUNCTIONS["some_tiles"] = case.attend
    yield case
    del ALL_ATTENTION_FUNCTIONS["some_tiles"]


def steps(module: Any, ids: Tensor) -> list[Tensor]:
    """Logits of the prompt's last token and of each token that follows, decoded one by one."""
    step = module(input_ids=ids[:, :PROMPT], use_cache=True)
    found = [step.logits[:, -1]]
    for place in range(PROMPT, PROMPT + NEW):
        new, past = ids[:, place : place + 1], step.past_key_values
        step = module(input_ids=new, past_key_values=past, use_cache=True)
        found.append(step.logits[:, -1])
    return found


@torch.no_grad()
def test_decoded_tokens_read_the_kept_tiles_and_prompts_all(kept: Case) -> None:
    expected, found = steps(kept.masked, kept.ids), steps(kept.opt, kept.ids)
    assert 400 < kept.left_out < PROMPT - TOP
    dense = steps(kept.model, kept.ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0], dense[0], rtol=1e-3, atol=1e-4)
    assert max(float((a - b).abs().max()) for a, b in zip(found, dense, strict=True)) > 0.01


@torch.no_grad()
def test_a_cache_that_was_cropped_and_reordered_goes_on(kept: Case) -> None:
    """Tokens that are taken back leave no trace in what is read after them."""
    ids = kept.ids.flip(0)
    expected = steps(kept.opt, ids)
    step = kept.opt(input_ids=kept.ids[:, :PROMPT], use_cache=True)
    cache = step.past_key_values
    cache.reserve(PROMPT + 100)
    other = torch.randint(3, 97, (2, 70))
    for new in (other[:, :1], other[:, 1:]):
        kept.opt(input_ids=new, past_key_values=cache, use_cache=True)
    cache.crop(-70)
    cache.reorder_cache(torch.tensor([1, 0]))
    for place, logits in zip(range(PROMPT, PROMPT + NEW), expected[1:], strict=True):
        new = ids[:, place : place + 1]
        step = kept.opt(input_ids=new, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, -1], logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_is_saved_and_loaded(kept: Case, tmp_path: Path) -> None:
    expected = kept.opt.generate(kept.ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False)
    kept.opt.save(tmp_path / "saved")
    loaded: Any = fxopt.load(tmp_path / "saved")
    assert torch.equal(
        loaded.generate(kept.ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False), expected
    )
    assert f'"exact+t{kept.label[3:]}"' in (tmp_path / "saved" / "graph.json").read_text()
