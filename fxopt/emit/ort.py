"""Running an ONNX file with torch tensors: numpy has neither bfloat16 nor e4m3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BFLOAT16, FLOAT8 = 16, 17
UNKNOWN = {torch.bfloat16: (BFLOAT16, torch.uint16), torch.float8_e4m3fn: (FLOAT8, torch.uint8)}
"""Types that numpy lacks: their numbers in ONNX, and what it takes their bits for."""


class Session:
    """onnxruntime on the CPU; `run` takes and returns tensors by name."""

    def __init__(self, path: str | Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs; inputs that the file does not have are left out."""
        feed = {name: _to_ort(inputs[name]) for name in self.inputs}
        found = self._session.run_with_ort_values(None, feed)
        return dict(zip(self.outputs, map(_from_ort, found), strict=True))


def _to_ort(tensor: Tensor) -> Any:
    from onnxruntime import OrtValue

    plain = tensor.detach().contiguous()
    if plain.dtype in UNKNOWN:
        kind, bits = UNKNOWN[plain.dtype]
        return OrtValue.ortvalue_from_numpy_with_onnx_type(plain.view(bits).numpy(), kind)
    return OrtValue.ortvalue_from_numpy(plain.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == BFLOAT16:
        return torch.from_dlpack(value._ortvalue.to_dlpack()).clone()
    if value.element_type() == FLOAT8:
        return torch.from_numpy(value.numpy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(value.numpy())
