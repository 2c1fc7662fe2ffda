"""A tensor as integer codes with one scale a group: `fxopt::pack_activation` and its inverse."""

from .op import pack_activation, unpack_activation
from .reference import pack_activation as REFERENCE
from .reference import packed_bytes

__all__ = ["REFERENCE", "pack_activation", "packed_bytes", "unpack_activation"]
