"""A module without its sites: the same code and shapes, and none of what sites compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxopt.capture import capture
from fxopt.decide.verify import peak_live_bytes
from fxopt.emit.editor import GraphEditor
from fxopt.emit.hollow import fresh, hollow, zeros_made_once
from fxopt.emit.module import emit


@pytest.fixture(scope="module")
def kept() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    captured = capture(model, {"input_ids": torch.randint(61, (2, 11))})
    return emit(captured, GraphEditor(captured), model)


@torch.no_grad()
def test_it_runs_all_but_its_sites(kept: Any) -> None:
    ids = torch.randint(61, (3, 7))
    before = kept(ids).logits
    weights: list[tuple[int, ...]] = []
    attended: list[int] = []
    made = hollow(
        kept,
        zeros_made_once(),
        linear=lambda weight: weights.append(tuple(weight.shape)),
        attention=lambda: attended.append(1),
    )
    output = made(ids, use_cache=True)
    assert output.logits.shape == before.shape
    assert not output.logits.any()
    assert len(weights) == 2 * 7 + 1
    assert len(attended) == 2
    assert output.past_key_values.get_seq_length() == 7
    assert not any(t.any() for state in output.past_key_values.states for t in state)
    assert torch.equal(kept(ids).logits, before), "the module itself is as it was"
    assert made.model.layers[0].mlp.up_proj.weight is kept.model.layers[0].mlp.up_proj.weight


@torch.no_grad()
def test_with_fresh_outputs_its_peak_is_the_module_s(kept: Any) -> None:
    ids, device = torch.randint(61, (2, 40)), torch.device("cpu")

    def peak(module: Any) -> int:
        module(ids)
        return peak_live_bytes(lambda: module(ids), device)

    assert peak(hollow(kept, fresh)) == pytest.approx(peak(kept), rel=0.05)


@torch.no_grad()
def test_what_is_held_beside_a_site_is_alive_with_its_output(kept: Any) -> None:
    ids, device = torch.randint(61, (1, 4)), torch.device("cpu")
    size = 10**6
    plain = hollow(kept, fresh)
    held = hollow(kept, fresh, linear=lambda weight: torch.empty(size, dtype=torch.uint8))
    most = peak_live_bytes(lambda: held(ids), device) - peak_live_bytes(lambda: plain(ids), device)
    assert 0.9 * size < most <= size
