"""Mixtures of experts in onnxruntime, against the model that they were made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import fxopt
from fxopt.emit.module import OptimizedModule
from fxopt.emit.ort import Session
from tests.emit.onnx_cases import everywhere, mixture

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
WORK = fxopt.Generate(batch=1, prompt=40, new_tokens=4)


def kept(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, OptimizedModule]:
    """A mixture, and what stands for it with its experts as they are."""
    model, example = mixture(dtype)
    opt, _ = everywhere("activation.last_logits", model, example, workload=WORK)
    return model, opt


def operators(path: Path) -> Counter[str]:
    model = onnx.load(path)
    assert {one.domain for one in model.opset_import} == {""}
    assert not model.functions
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_run_for_their_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    model, opt = kept(dtype)
    report = opt.export_onnx(tmp_path / "model.onnx")
    # one loop a product, however many experts there are
    assert operators(report.path)["Loop"] == 4
    session, exact = Session(report.path), model.float()
    # one token goes to three of the seven experts, a hundred and twenty meet them all
    for batch, length in ((1, 1), (2, 3), (3, 40)):
        given = {
            "input_ids": torch.randint(3, 97, (batch, length)),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
            "position_ids": torch.arange(length).repeat(batch, 1),
        }
        with torch.no_grad():
            wanted = exact(**given).logits
        torch.testing.assert_close(session.run(given)["logits"], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["activation.last_logits", "linear.quantized_experts"])
def test_experts_decode_with_a_cache(name: str, tmp_path: Path) -> None:
    opt, _ = everywhere(name, *mixture(), workload=WORK)
    report = opt.export_onnx(tmp_path / "model.onnx", kind="generate")
    assert report.difference < 1e-4
    assert operators(report.path)["Loop"] == 4
