"""Rotary position embedding, of queries and keys at once with what mixes their channels:
`fxopt::rotate`, `fxopt::rotate_both`."""

from .op import rotate, rotate_both
from .reference import rotate as REFERENCE

__all__ = ["REFERENCE", "rotate", "rotate_both"]
