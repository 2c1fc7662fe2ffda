"""Products of sorted rows with the integer weights of several experts: `fxopt::quantized_experts`.

No `REFERENCE`: how many rows an expert has is data, which a trace cannot follow.
"""

from .op import quantized_experts

__all__ = ["quantized_experts"]
