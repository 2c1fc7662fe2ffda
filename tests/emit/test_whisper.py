"""Whisper: a generate of its own over the emitted graph."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import emit
from fxopt.emit.save import load
from fxopt.ir.errors import FxoptError
from tests.emit.seq2seq_models import example, make, packed


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(4)  # some random models transcribe a long recording for minutes
    model = make("whisper")
    captured = capture(model, example(model))
    return model, emit(captured, GraphEditor(captured), model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "de", "task": "translate"},
        pytest.param({"return_timestamps": True}, marks=pytest.mark.slow),
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        {"attention_mask": torch.ones(2, 160), "max_new_tokens": 7},
    ],
    ids=["plain", "language", "timestamps", "beams", "mask"],
)
def test_whisper_has_its_own_generate(whisper, options):
    features = torch.randn(2, 8, 160)
    want, got = (module.generate(features, **options) for module in whisper)
    assert torch.equal(want, got)


@pytest.mark.exhaustive
def test_whisper_transcribes_long_recordings(whisper):
    features = torch.randn(2, 8, 410)
    options = {"return_timestamps": True, "attention_mask": torch.ones(2, 410, dtype=torch.long)}
    want, got = (module.generate(features, **options) for module in whisper)
    assert want.shape[1] > 40
    assert torch.equal(want, got)


def test_whisper_refuses_padded_prompts(whisper):
    ids = torch.randint(3, 61, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(FxoptError, match="decoder_attention_mask: padded prompts"):
        whisper[1](torch.randn(2, 8, 160), decoder_input_ids=ids, decoder_attention_mask=mask)


@pytest.mark.slow
def test_saved_whisper_generates_packed(tmp_path):
    opt, _ = packed(make("whisper"))
    features = torch.randn(2, 8, 160)
    want = opt.generate(features, language="en")
    opt.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again) is type(opt)
    assert torch.equal(again.generate(features, language="en"), want)


@pytest.mark.slow
def test_a_budget_packs_whisper_without_example_inputs():
    opt = fxopt.optimize(
        make("whisper").to(torch.bfloat16),
        fxopt.Budget(kv_cache="95%", kl=5.0),
        workload=fxopt.Generate(batch=2, prompt=80, new_tokens=30),
    )
    packed = [state.layout for state in opt.program.states if state.cross and state.layout]
    assert packed
    assert all("r0s0" in layout for layout in packed)
    assert opt.generate(torch.randn(2, 8, 160, dtype=torch.bfloat16)).shape[0] == 2
