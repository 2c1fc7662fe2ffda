"""Attention through a KV cache stored exactly or as packed blocks."""

from .layout import (
    Blocks,
    Layout,
    allocate,
    empty_past,
    from_formats,
    parse,
    state_bytes,
    with_head,
)
from .op import cached_attention, decoded_attention
from .reference import cached_attention_functional

__all__ = [
    "Blocks",
    "Layout",
    "allocate",
    "cached_attention",
    "cached_attention_functional",
    "decoded_attention",
    "empty_past",
    "from_formats",
    "parse",
    "state_bytes",
    "with_head",
]
