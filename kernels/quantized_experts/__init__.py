"""Products of sorted rows with the integer weights of several experts: `fxopt::quantized_experts`.

`grouped_mm` and `REFERENCE` are what an exporter sees of those with float and integer weights.
"""

from .onnx import grouped_mm
from .onnx import quantized_experts_onnx as REFERENCE
from .op import quantized_experts

__all__ = ["REFERENCE", "grouped_mm", "quantized_experts"]
