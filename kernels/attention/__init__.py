"""Scaled dot-product attention with grouped heads: exact, windowed, with sinks."""

from .reference import attention_reference, attention_with_lse
from .traceable import attention_traceable

REFERENCE = attention_traceable

__all__ = ["REFERENCE", "attention_reference", "attention_traceable", "attention_with_lse"]
