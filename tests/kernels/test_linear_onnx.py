"""The references of the linear ops, traced to ONNX, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxopt.kernels import low_rank_linear, monarch_linear, quantized_linear

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class References(nn.Module):
    """One layer of each op, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        make = {
            "bias": torch.randn(84), "down": torch.randn(9, 84), "up": torch.randn(84, 9),
            "right": torch.randn(3, 15, 28), "left": torch.randn(3, 28, 15),
        }  # fmt: skip
        for bits, group in ((4, 42), (8, 84)):
            weight = quantized_linear.quantize(torch.randn(84, 84), bits, group)
            make |= dict(zip((f"packed{bits}", f"scale{bits}", f"zero{bits}"), weight, strict=True))
        for name, tensor in make.items():
            self.register_buffer(name, tensor / 9 if tensor.is_floating_point() else tensor)

    def forward(self, x: Tensor) -> Tensor:
        b = self.bias
        x = quantized_linear.REFERENCE(x, self.packed4, self.scale4, self.zero4 * 9, b, 4, 42)
        x = quantized_linear.REFERENCE(x, self.packed8, self.scale8, self.zero8 * 9, None, 8, 84)
        x = low_rank_linear.REFERENCE(x, self.down, self.up, b)
        return monarch_linear.REFERENCE(x, self.right, self.left, b)


def test_references_run_in_onnxruntime(tmp_path: Path) -> None:
    module = References().eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.randn(2, 3, 84),), dynamic_shapes=dynamic)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 84), (1, 1, 84), (4, 7, 84)):
        x = torch.randn(shape)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = module(x)
        assert (torch.from_numpy(out) - expected).abs().max() <= 1e-5 * expected.abs().max()
