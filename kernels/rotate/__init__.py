"""Rotary position embedding: `fxopt::rotate`."""

from .op import rotate
from .reference import rotate as REFERENCE

__all__ = ["REFERENCE", "rotate"]
