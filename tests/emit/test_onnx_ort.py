"""What `target="ort"` leaves to onnxruntime's own operators, and what it says of the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from tests.emit.onnx_cases import GENERATE, everywhere, llama

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

GROUPED = "com.microsoft::GroupQueryAttention"


def kept(model: nn.Module) -> OptimizedModule:
    example = {"input_ids": torch.randint(3, 97, (1, 40))}
    captured = capture(model, example)
    opt = emit(captured, GraphEditor(captured), model)
    assert isinstance(opt, OptimizedModule)
    return opt


def test_causal_prompts_of_sliding_windows_and_caps(tmp_path: Path) -> None:
    """Gemma 2 has both, and layers without a window between."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    opt = kept(transformers.Gemma2ForCausalLM(config).eval())
    report = opt.export_onnx(tmp_path / "model.onnx", target="ort")
    assert report.difference < 1e-5
    assert report.contrib == {GROUPED: 2}
    nodes = [n for n in onnx.load(report.path).graph.node if n.op_type == "GroupQueryAttention"]
    given = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in nodes]
    assert Counter(found["local_window_size"] for found in given) == {8: 1, -1: 1}
    assert all(found["softcap"] == 50 for found in given)
    assert not any("GroupQuery" in note for note in report.notes)


@pytest.mark.slow
def test_windows_of_a_plan(tmp_path: Path) -> None:
    """Those with a sink are no sliding windows; the file says why it has them otherwise."""
    model, example = llama()
    opt, _ = everywhere("attention.window", model, example, workload=GENERATE)
    report = opt.export_onnx(tmp_path / "model.onnx", target="ort")
    assert report.contrib == {}
    reason = "GroupQueryAttention: heads see other keys than one sliding window"
    assert reason in report.notes


@pytest.mark.slow
def test_a_decoded_token_keeps_the_standard(tmp_path: Path) -> None:
    opt = kept(llama()[0])
    report = opt.export_onnx(tmp_path / "model.onnx", kind="generate", target="ort")
    assert report.contrib == {}
    assert "slower for one row" in " ".join(report.notes)
