"""ONNX files: what they hold, and that onnxruntime computes what the module computes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.lowering import Lowered, empty_states, state_names
from fxopt.emit.module import emit
from fxopt.emit.onnx import OnnxReport
from fxopt.emit.ort import Session
from fxopt.ir.errors import ExportError
from fxopt.kernels.kv_attention.layout import functional_names, parse, split_state

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def shapes(values) -> dict[str, list[str | int]]:
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


@pytest.fixture(scope="module")
def generation(rewritten, tmp_path_factory) -> OnnxReport:
    return rewritten().export_onnx(tmp_path_factory.mktemp("onnx") / "g.onnx", kind="generate")


@pytest.mark.slow
def test_forward_of_a_vit(case, tmp_path):
    opt = case("vit").emit()
    report = opt.export_onnx(tmp_path / "vit.onnx")
    assert report.difference < 1e-5
    assert os.listdir(tmp_path) == ["vit.onnx"]
    model = onnx.load(report.path)
    assert shapes(model.graph.input) == {"pixel_values": ["batch", 3, 16, 16]}
    assert shapes(model.graph.output)["logits"][0] == "batch"
    assert {o.domain: o.version for o in model.opset_import}[""] == 23
    assert not any("stack_trace" in p.key for n in model.graph.node for p in n.metadata_props)
    images = torch.randn(5, 3, 16, 16)
    found = Session(report.path).run({"pixel_values": images})["logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, opt(images).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_forward_of_a_rewritten_llama(rewritten, tmp_path):
    opt = rewritten()
    report = opt.export_onnx(tmp_path / "llama.onnx")
    model = onnx.load(report.path)
    assert shapes(model.graph.input)["input_ids"] == ["batch", "length"]
    made = {
        (properties["ai.fxopt.site"], properties["ai.fxopt.rewrite"])
        for node in model.graph.node
        if "ai.fxopt.site" in (properties := {p.key: p.value for p in node.metadata_props})
    }
    assert ("model.layers.1.mlp.gate_proj", "linear.low_rank") in made
    assert ("model.layers.1.self_attn.o_proj", "linear.quantized") in made
    assert "activation.chunked" in {rewrite for _, rewrite in made}
    assert all(rewrite != "kv_cache.blocks" or "self_attn" in site for site, rewrite in made)
    ids = torch.randint(3, 61, (3, 6))
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(6).expand(3, 6),
    }
    found = Session(report.path).run(given)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, opt(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_generation_is_one_file_with_named_state(generation, rewritten):
    model = onnx.load(generation.path)
    inputs, outputs = shapes(model.graph.input), shapes(model.graph.output)
    # One length for all layers: that of a packed one in blocks of 32 and what is not packed yet.
    assert inputs["past.0.key.0"][:3] == ["batch", 1, "blocks"]
    assert inputs["past.0.recent_key.0"] == ["batch", 1, "recent", 8]
    assert inputs["past.1.key"] == ["batch", 2, "32*blocks + recent", 8]
    assert inputs["attention_mask"][0] == "batch"
    assert outputs["logits"][:2] == ["batch", "length"]
    expected = [
        f"{layer}.{name}"
        for layer, state in enumerate(rewritten().program.states)
        for name in state_names(state)
    ]
    assert [n.removeprefix("past.") for n in inputs if n.startswith("past.")] == expected
    assert [n.removeprefix("present.") for n in outputs if n != "logits"] == expected
    dtypes = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    assert dtypes["past.0.key.0"] == onnx.TensorProto.UINT8
    assert dtypes["past.0.key.1"] == onnx.TensorProto.FLOAT8E4M3FN


@pytest.mark.slow
def test_prefill_and_ten_steps_with_the_modules_packed_bytes(generation, rewritten):
    opt, run = rewritten(), Session(generation.path)
    lowered = Lowered(opt.program, opt.program.tree.collect(opt), "generate", torch.float32)
    empty = zip(lowered.slots, empty_states(lowered, 2), strict=True)
    states = {slot.past: state for slot, state in empty}
    ids = torch.randint(3, 61, (2, 75))
    cache, past = opt.make_cache(2, 128), 0
    for step in ids.split([65, *[1] * 10], 1):
        length = step.shape[1]
        mask = torch.ones(2, past + length, dtype=torch.int64)
        mask[0, :3] = 0
        positions = torch.arange(past, past + length).expand(2, length)
        given = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
        found = run.run({**given, **states})
        with torch.no_grad():
            wanted = opt(**given, past_key_values=cache).logits
        torch.testing.assert_close(found["logits"], wanted, atol=1e-4, rtol=0)
        states = {n.replace("present", "past"): v for n, v in found.items() if n != "logits"}
        past += length
    compared = sum(compare_packed(layer, state, cache, states)
                   for layer, state in enumerate(opt.program.states))  # fmt: skip
    assert compared >= 12


def compare_packed(layer, state, cache, states) -> int:
    """How many packed tensors of a layer were compared; all of them have to be equal."""
    layout = parse(state.layout)
    classes = split_state(layout, state.num_kv_heads, cache.states[layer])
    every = functional_names(layout, state.num_kv_heads)
    count = 0
    for index, ((_, fmt, part), names) in enumerate(zip(classes, every, strict=True)):
        for name in names if fmt is not None else ():
            if name.startswith(("sink_", "recent_")):
                continue
            suffix = f".{index}" if len(every) > 1 else ""
            found = states[f"past.{layer}.{name}{suffix}"]
            assert found.shape[2] >= 2
            known = part[name][:, :, : found.shape[2]]
            assert bool((known == found).all()), f"{layer}.{name}"
            count += 1
    return count


def test_half_precision_is_written_as_float32(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x):
            return self.linear(x).float().softmax(-1).to(torch.bfloat16)

    model, x = Halves().bfloat16(), torch.randn(4, 6, dtype=torch.bfloat16)
    captured = capture(model, x)
    opt = emit(captured, GraphEditor(captured), model)
    report = opt.export_onnx(tmp_path / "half.onnx")
    found = Session(report.path).run({"x": x.float()})[report.outputs[0]]
    assert found.dtype == torch.float32
    wanted = model.float().linear(x.float()).softmax(-1)
    torch.testing.assert_close(found, wanted)


class Odd(nn.Module):
    def forward(self, x):
        return torch.linalg.eigh(x @ x.T)[0]


def test_what_does_not_translate_is_an_error_and_no_file(tmp_path):
    x = torch.randn(4, 3)
    captured = capture(Odd(), x)
    opt = emit(captured, GraphEditor(captured), Odd())
    with pytest.raises(ExportError, match=r"Odd cannot be .*nothing was written"):
        opt.export_onnx(tmp_path / "odd.onnx")
    assert os.listdir(tmp_path) == []


@torch.library.custom_op("fxopt::untraceable_for_test", mutates_args=())
def untraceable(x: torch.Tensor) -> torch.Tensor:
    return x + 1


untraceable.register_fake(torch.empty_like)


def test_an_op_without_a_reference_is_named_with_its_site(tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    captured = capture(model, x)
    editor = GraphEditor(captured)
    site = next(s for s in captured.sites if s.key == "1")
    with editor.applying("linear.odd"):
        target = torch.ops.fxopt.untraceable_for_test.default
        editor.replace(site, editor.call(site, target, (editor.node(site),), {}))
    opt = emit(captured, editor, model)
    with pytest.raises(ExportError, match=r"1: fxopt::untraceable_for_test .*linear\.odd"):
        opt.export_onnx(tmp_path / "odd.onnx")
    assert os.listdir(tmp_path) == []


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


def test_a_buffer_that_the_forward_changes_is_named(tmp_path):
    x = torch.randn(4, 3)
    captured = capture(Counting(), x)
    opt = emit(captured, GraphEditor(captured), Counting())
    with pytest.raises(ExportError, match=r"the forward changes calls .*nothing was written"):
        opt.export_onnx(tmp_path / "counting.onnx")
    assert os.listdir(tmp_path) == []


def small():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(4, 6)
    captured = capture(model, x)
    return emit(captured, GraphEditor(captured), model)


def test_large_weights_lie_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("fxopt.emit.onnx.EXTERNAL_BYTES", 64)
    opt = small()
    report = opt.export_onnx(tmp_path / "model.onnx")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert report.size == sum(file.stat().st_size for file in files)
    x = torch.randn(7, 6)
    (found,) = Session(report.path).run({report.inputs[0]: x}).values()
    with torch.no_grad():
        torch.testing.assert_close(found, opt(x))


@pytest.mark.parametrize("threshold", [64, 2**30])
def test_a_file_that_differs_is_not_left_behind(tmp_path, monkeypatch, threshold):
    monkeypatch.setattr("fxopt.emit.onnx.EXTERNAL_BYTES", threshold)
    monkeypatch.setattr("fxopt.emit.onnx.TOLERANCE", -1.0)
    (tmp_path / "model.onnx").write_bytes(b"of another day")
    with pytest.raises(ExportError, match=r"onnxruntime differs .*nothing was written"):
        small().export_onnx(tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"of another day"


def test_wrong_requests(case, tmp_path):
    opt = case("vit").emit()
    with pytest.raises(ExportError, match="no generation graph"):
        opt.export_onnx(tmp_path / "v.onnx", kind="generate")
    with pytest.raises(ExportError, match='kind is "forward"'):
        opt.export_onnx(tmp_path / "v.onnx", kind="backward")
    with pytest.raises(ExportError, match="optimise that"):
        opt.export_onnx(tmp_path / "v.onnx", dtype=torch.float16)
    with pytest.raises(ExportError, match=r"got 'fp16'; pass a dtype of torch, such as torch\.fl"):
        opt.export_onnx(tmp_path / "v.onnx", dtype="fp16")
    with pytest.raises(ExportError, match="folder that exists"):
        opt.export_onnx(tmp_path / "no" / "v.onnx")


def test_a_report_lists_what_the_file_takes_and_returns():
    report = OnnxReport(
        Path("m.onnx"), "generate", "portable", 23, 10, {}, 2**20, 1e-6, 1e-6, 0.0,
        inputs=("input_ids", "past.0.key", "past.0.value"),
        outputs=("logits", "present.0.key", "present.0.value"),
    )  # fmt: skip
    lines = str(report).splitlines()
    assert "takes input_ids, past.<layer>.<name> (2 in all)" in lines
    assert "returns logits, present.<layer>.<name> (2 in all)" in lines
    forward = replace(report, inputs=("input_ids", "attention_mask"), outputs=("logits",))
    assert "takes input_ids, attention_mask\nreturns logits\n" in str(forward)


@pytest.mark.slow
def test_a_plan_for_forward_passes_generates_too(tmp_path):
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 97, (6, 24))
    opt = fxopt.optimize(
        model, fxopt.Budget(weights="100%"), {"input_ids": ids[:1]}, workload=fxopt.Forward(),
        calibration=[{"input_ids": row[None]} for row in ids],
    )  # fmt: skip
    report = opt.export_onnx(tmp_path / "g.onnx", kind="generate")
    assert report.inputs[-2:] == ("past.0.key", "past.0.value")
