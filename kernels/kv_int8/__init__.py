"""Decoding over packed blocks as integers, on int8 tensor cores."""
