"""Linear layer in 8-bit floating point with one scale a row: `fxopt::fp8_linear`."""

from .op import fp8_linear
from .reference import dequantize, quantize, row_scale
from .reference import fp8_linear as REFERENCE

__all__ = ["REFERENCE", "dequantize", "fp8_linear", "quantize", "row_scale"]
