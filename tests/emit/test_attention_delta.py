"""A causal LM whose heads are corrected, against Hugging Face's own attention put together so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from tests.emit.onnx_cases import GENERATE, everywhere, llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

PROMPT, NEW, WINDOW, SINK = 700, 3, 256, 16


class Case:
    """`opt` is corrected in all four heads of two layers; `mended` is what it should compute."""

    def __init__(self) -> None:
        self.model, _ = llama(2)
        for module in self.model.modules():
            if hasattr(module, "q_proj"):
                module.q_proj.weight.data *= 2  # sharper attention
        self.ids = torch.randint(3, 97, (2, PROMPT + NEW))
        self.opt, chosen = everywhere(
            "attention.window", self.model, {"input_ids": self.ids[:1]},
            label=f"w{WINDOW}+s{SINK}+d64", workload=GENERATE,
        )  # fmt: skip
        assert len(chosen) == 4
        self.mended: Any = copy.deepcopy(self.model)
        self.mended.config._attn_implementation = "mended_reference"
        found = [node.kwargs["delta"] for node in self.opt.graph.nodes if "delta" in node.kwargs]
        self.shares = [torch.tensor(delta) / 1000 for delta in found]  # of each layer
        assert all((share > 0).all() for share in self.shares)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        keys = k.shape[2]
        rows, columns = torch.arange(keys)[:, None], torch.arange(keys)
        shown = self.padding[:, None, None, :keys] != 0
        seen = (columns <= rows) & shown
        first = shown.to(torch.int64).cumsum(-1) <= SINK
        near = seen & ((rows - columns < WINDOW) | first)
        k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
        scores = q @ k.mT * module.scaling

        def under(visible: Tensor) -> Tensor:
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
            return (weights @ v).transpose(1, 2)

        dense, sparse = under(seen), under(near)
        asked = torch.arange(keys) // 64 * 64
        share = self.shares[module.layer_idx][:, None]
        out = sparse + (dense - sparse)[:, asked] * share
        out[:, ::64] = dense[:, ::64]
        # Six tiles of queries, of which the last two and decoded tokens see all keys.
        out[:, 512:] = dense[:, 512:]
        return out.contiguous(), None

    @torch.no_grad()
    def expected(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        self.padding = torch.ones_like(ids) if padding is None else padding
        positions = (self.padding.cumsum(1) - 1).clamp(min=0)
        return self.mended(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    made = Case()
    ALL_ATTENTION_FUNCTIONS["mended_reference"] = made.attend
    yield made
    del ALL_ATTENTION_FUNCTIONS["mended_reference"]


@torch.no_grad()
def test_a_prompt_is_corrected_with_and_without_a_cache(case: Case) -> None:
    ids = case.ids[:, :PROMPT]
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, shown = case.expected(ids, mask), mask.bool()
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    for cached in (False, True):
        logits = case.opt(**arguments, use_cache=cached).logits
        torch.testing.assert_close(logits[shown], expected[shown], rtol=1e-3, atol=1e-4)
    dense = case.model(**arguments).logits
    assert (expected - dense)[1, 300:].abs().max() > 0.01


@torch.no_grad()
def test_decoded_tokens_see_the_whole_cache(case: Case) -> None:
    expected = case.expected(case.ids)
    step = case.opt(input_ids=case.ids[:, :PROMPT], use_cache=True)
    for place in range(PROMPT, PROMPT + NEW):
        new, past = case.ids[:, place : place + 1], step.past_key_values
        step = case.opt(input_ids=new, past_key_values=past, use_cache=True)
        torch.testing.assert_close(step.logits[:, -1], expected[:, place], rtol=1e-3, atol=1e-4)
    generated = case.opt.generate(case.ids[:1, :PROMPT], max_new_tokens=1, do_sample=False)
    assert int(generated[0, -1]) == int(expected[0, PROMPT - 1].argmax())


@torch.no_grad()
def test_it_is_saved_loaded_and_exported(case: Case, tmp_path: Path) -> None:
    ids = case.ids[:1, :PROMPT]
    expected = case.opt(input_ids=ids).logits
    case.opt.save(tmp_path / "saved")
    assert torch.equal(fxopt.load(tmp_path / "saved")(input_ids=ids).logits, expected)
    pytest.importorskip("onnxruntime")
    report = case.opt.export_onnx(tmp_path / "generate.onnx", kind="generate")
    assert report.difference < 1e-4
