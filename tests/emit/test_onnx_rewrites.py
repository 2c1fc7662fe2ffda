"""Every rewrite as ONNX: onnxruntime computes what the rewritten module computes."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxopt
from fxopt import passes
from tests.emit.onnx_cases import GENERATE, everywhere, llama, mixture, mlp, vision

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

# A rewrite of training steps only leaves nothing in a forward.
NAMES = [name for name in passes.available() if set(passes.load([name])[0].workloads) != {"train"}]
DECODES = fxopt.Generate(batch=1, prompt=40, new_tokens=4)


def rewrites_in(path: Path) -> set[str]:
    properties = [{p.key: p.value for p in n.metadata_props} for n in onnx.load(path).graph.node]
    return {found["ai.fxopt.rewrite"] for found in properties if "ai.fxopt.rewrite" in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_rewrite_is_exported(name: str, tmp_path: Path) -> None:
    if name == "linear.quantized_tied":
        opt, chosen = everywhere(name, *llama(tied=True))
    elif name == "linear.quantized_experts":
        opt, chosen = everywhere(name, *mixture(), workload=DECODES)
    elif name.startswith("linear."):
        opt, chosen = everywhere(name, *mlp())
    elif name == "attention.neighborhood":
        opt, chosen = everywhere(name, *vision())
    else:
        opt, chosen = everywhere(name, *llama(), workload=GENERATE)
    kind = "generate" if opt.program.causal_lm else "forward"
    report = opt.export_onnx(tmp_path / "model.onnx", kind=kind)
    assert report.difference < 1e-4
    # Those without parameters are applied by whoever calls the graph.
    edits = any(proposal.candidate.parameters for proposal in chosen)
    assert rewrites_in(report.path) == ({name} if edits else set())


@pytest.mark.slow
def test_fp8_layers_agree_under_equal_roundings(tmp_path: Path) -> None:
    opt, chosen = everywhere("linear.quantized", *mlp(), label="fp8")
    assert len(chosen) == 6
    report = opt.export_onnx(tmp_path / "model.onnx")
    assert report.difference < 1e-4
    assert report.difference <= report.free_difference
    # the outputs that say how inputs were rounded are of the check alone
    assert len(report.outputs) == 1
    assert len(onnx.load(report.path).graph.output) == 1


def test_the_names_are_those_of_inference() -> None:
    assert "activation.recompute" not in NAMES
    assert {"kv_cache.blocks", "linear.quantized", "attention.window"} <= set(NAMES)
