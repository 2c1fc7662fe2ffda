"""Attention through a cache in plain PyTorch: growing, in place, filled once, and measured in one
pass."""

from .decoded import decoded_attention
from .filled import filled_attention
from .functional import cached_attention_functional
from .mutating import cached_attention_mutating

__all__ = [
    "cached_attention_functional",
    "cached_attention_mutating",
    "decoded_attention",
    "filled_attention",
]
