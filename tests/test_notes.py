"""What a capture could not keep of a model is said in the plan and in the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.ir.errors import FxoptError

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def ids(length: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(97, (1, length))} for _ in range(4)]


def said(opt: Any) -> list[str]:
    """What plan, report and page say of the capture; all the same."""
    notes = [note for note in opt.plan.notes if note.startswith("capture: ")]
    assert notes == [note for note in opt.report.notes if note.startswith("capture: ")]
    shown = " ".join(str(opt.plan).split())
    assert all(note in shown for note in notes)
    return notes


def test_mamba_says_which_length_is_fixed_and_that_it_does_not_generate() -> None:
    hf = pytest.importorskip("transformers")
    model = hf.MambaForCausalLM(hf.MambaConfig(**SIZES, state_size=4)).eval()
    data = ids(7)
    opt = fxopt.optimize(model, fxopt.Budget(weights="80%"), data[0], calibration=data)
    sizes, generation = said(opt)
    assert sizes.endswith("no others: input_ids dim 1 = 7, attention_mask dim 1 = 7")
    reason = "its forward has no argument position_ids"
    assert generation == f"capture: no generate and no KV cache, as {reason}"
    with pytest.raises(FxoptError, match=f"no generate: {reason}"):
        opt.generate(data[0]["input_ids"])
    made = fxopt.plan(model, fxopt.Budget(weights="80%"), data[0], calibration=data)
    assert [n for n in made.notes if n.startswith("capture: ")] == [sizes, generation]


def test_a_text_decoder_that_is_served_says_nothing() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(**SIZES, intermediate_size=64, num_attention_heads=2)
    model, data = hf.LlamaForCausalLM(config).eval(), ids(9)
    opt = fxopt.optimize(model, fxopt.Budget(weights="80%"), data[0], calibration=data)
    assert not said(opt)


def test_a_replayed_and_a_loaded_module_say_it_too(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    data = [torch.randn(1, 5, 96) for _ in range(4)]
    opt = fxopt.optimize(model, fxopt.Budget(weights="60%"), data[0], calibration=data)
    (sizes,) = said(opt)
    assert sizes.endswith("no others: input dim 2 = 96")
    assert said(fxopt.apply(model, opt.plan, example_inputs=data[0])) == [sizes]
    opt.save(tmp_path / "saved")
    assert said(fxopt.load(tmp_path / "saved")) == [sizes]
