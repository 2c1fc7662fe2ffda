"""A causal LM whose heads keep tiles, against Hugging Face's own attention under the same masks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.kernels.attention.spec import per_head
from fxopt.kernels.block_topk.reference import TILE, chosen_tiles
from fxopt.kernels.hip.reference import chosen_tiles as halved_tiles
from tests.emit.onnx_cases import GENERATE, everywhere, llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

PROMPT, NEW = 1600, 3
CHOOSE = {"attention.block_topk": chosen_tiles, "attention.hip": halved_tiles}


class Case:
    """`opt` keeps tiles in all four heads of two layers; `masked` is what it should compute."""

    def __init__(self, rewrite: str) -> None:
        self.choose = CHOOSE[rewrite]
        self.model, example = llama(2)
        for module in self.model.modules():
            if hasattr(module, "q_proj"):
                module.q_proj.weight.data *= 2  # sharper attention
        self.opt, chosen = everywhere(rewrite, self.model, example, workload=GENERATE)
        assert len(chosen) == 4
        self.masked: Any = copy.deepcopy(self.model)
        self.masked.config._attn_implementation = "tiles_reference"
        self.kept = [
            {name: node.kwargs[name] for name in ("top", "mass") if name in node.kwargs}
            for node in self.opt.graph.nodes
            if "top" in node.kwargs
        ]  # of each layer
        if rewrite == "attention.block_topk":
            # Candidates take turns: some heads keep a share, others a part of their attention.
            masses = [per_head("mass", kept.get("mass", (0,)), 2) for kept in self.kept]
            assert {bool(mass) for layer in masses for mass in layer} == {False, True}
        self.ids = torch.randint(3, 97, (2, PROMPT + NEW))

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        """Rows of the prompt see the tiles that are kept of it, the others all keys before."""
        keys, group = k.shape[2], module.num_key_value_groups
        rows, columns = torch.arange(q.shape[2]), torch.arange(keys)
        seen = columns <= rows[:, None]
        if self.padding is not None:
            seen = seen & (self.padding[:, None, None, :keys] != 0)
        prompt = [x[:, :, :PROMPT] for x in (q, k)]
        hidden = None if self.padding is None else self.padding[:, :PROMPT]
        kept_of = self.kept[module.layer_idx]
        tiles = self.choose(*prompt, hidden, module.scaling, 0.0, **kept_of).flatten(1, 2)
        kept = torch.ones(q.shape[0], q.shape[1], len(rows), keys, dtype=torch.bool)
        by_tile = tiles[:, :, rows[:PROMPT] // TILE][..., columns[:PROMPT] // TILE]
        kept[:, :, :PROMPT, :PROMPT] = by_tile
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = (q @ k.mT * module.scaling).masked_fill(~(seen & kept), -torch.inf)
        return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def expected(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        self.padding = padding
        positions = None if padding is None else (padding.cumsum(1) - 1).clamp(min=0)
        return self.masked(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.fixture(scope="module", params=[*CHOOSE])
def kept(request: pytest.FixtureRequest) -> Iterator[Case]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    case = Case(request.param)
    ALL_ATTENTION_FUNCTIONS["tiles_reference"] = case.attend
    yield case
    del ALL_ATTENTION_FUNCTIONS["tiles_reference"]


@torch.no_grad()
def test_a_prompt_leaves_tiles_out_with_and_without_a_cache(kept: Case) -> None:
    ids = kept.ids[:, :PROMPT]
    mask = torch.ones_like(ids)
    mask[0, :150] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, shown = kept.expected(ids, mask), mask.bool()
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    for cached in (False, True):
        logits = kept.opt(**arguments, use_cache=cached).logits
        torch.testing.assert_close(logits[shown], expected[shown], rtol=1e-3, atol=1e-4)
    dense = kept.model(**arguments).logits
    assert (expected - dense)[1, 1100:].abs().max() > 0.01


@torch.no_grad()
def test_decoded_tokens_see_the_whole_cache(kept: Case) -> None:
    expected = kept.expected(kept.ids)
    step = kept.opt(input_ids=kept.ids[:, :PROMPT], use_cache=True)
    for place in range(PROMPT, PROMPT + NEW):
        new, past = kept.ids[:, place : place + 1], step.past_key_values
        step = kept.opt(input_ids=new, past_key_values=past, use_cache=True)
        torch.testing.assert_close(step.logits[:, -1], expected[:, place], rtol=1e-3, atol=1e-4)
    generated = kept.opt.generate(kept.ids[:1, :PROMPT], max_new_tokens=1, do_sample=False)
    assert int(generated[0, -1]) == int(expected[0, PROMPT - 1].argmax())


@torch.no_grad()
def test_it_is_saved_loaded_and_compiled(kept: Case, tmp_path: Path) -> None:
    ids = kept.ids[:1, :PROMPT]
    expected = kept.opt(input_ids=ids).logits
    kept.opt.save(tmp_path / "saved")
    assert torch.equal(fxopt.load(tmp_path / "saved")(input_ids=ids).logits, expected)
    compiled = torch.compile(kept.opt, fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
