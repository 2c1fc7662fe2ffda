"""Storing new tokens in a packed cache: quantised blocks, sink, recent tokens."""
