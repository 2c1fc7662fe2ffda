"""A token-wise piece of a graph run a few rows at a time."""

from .program import run
from .reference import chunked_reference, chunked_traceable

REFERENCE = chunked_traceable

__all__ = ["REFERENCE", "chunked_reference", "chunked_traceable", "run"]
