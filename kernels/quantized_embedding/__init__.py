"""Rows of a table of int8 or int4 weights: `fxopt::quantized_embedding`."""

from .op import quantized_embedding
from .reference import quantized_embedding as REFERENCE

__all__ = ["REFERENCE", "quantized_embedding"]
