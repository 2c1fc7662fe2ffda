"""Decoding over packed blocks as they are stored, on int8 or float16 tensor cores."""
