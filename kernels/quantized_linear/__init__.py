"""Linear layer on int8 or int4 weights: `fxopt::quantized_linear`."""

from .op import quantized_linear
from .reference import dequantize, pack, quantize, unpack
from .reference import quantized_linear as REFERENCE

__all__ = ["REFERENCE", "dequantize", "pack", "quantize", "quantized_linear", "unpack"]
