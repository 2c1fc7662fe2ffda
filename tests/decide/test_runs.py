"""Workloads as calls of a module, of the original and of what is emitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fxopt.capture import capture
from fxopt.decide.runs import calls, peak_temporaries, prefilled, prompt_of
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import emit
from fxopt.ir.workload import Generate

WORK = Generate(batch=3, prompt=20, new_tokens=10)


def models(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A model, what is emitted of it unchanged, and its example inputs."""
    torch.manual_seed(0)
    ids = torch.randint(3, 61, (2, 11))
    if name == "t5":
        config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        model: nn.Module = T5ForConditionalGeneration(config).eval()
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                   "decoder_input_ids": ids[:, :7]}  # fmt: skip
    else:
        config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48,
                             num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
        model, example = LlamaForCausalLM(config).eval(), {"input_ids": ids}
    captured = capture(model, example)
    return model, emit(captured, GraphEditor(captured), model), example


@pytest.mark.parametrize(("name", "length"), [("llama", 20), ("t5", 1)])
def test_calls_run_on_the_original_and_on_what_is_emitted(name: str, length: int) -> None:
    model, opt, example = models(name)
    prompt = prompt_of(example, WORK)
    assert prompt["input_ids"].shape == (3, 20)
    for module in (model, opt):
        output = prefilled(module, prompt)
        assert output.past_key_values.get_seq_length() == length
        names = []
        for called, call in calls(module, WORK, example):
            names.append(called)
            call()
            call()
        assert names == ["prefill", "decode"]
        assert peak_temporaries(module, WORK, example, torch.device("cpu")) > 0


def test_the_tokens_of_a_prompt_are_the_examples() -> None:
    ids = torch.arange(8).view(2, 4)
    features = torch.randn(2, 5, 6)
    prompt = prompt_of({"input_features": features, "decoder_input_ids": ids}, WORK, 6)
    assert prompt["decoder_input_ids"].tolist()[2] == [0, 1, 2, 3, 0, 1]
    assert torch.equal(prompt["input_features"], features[[0, 1, 0]])
