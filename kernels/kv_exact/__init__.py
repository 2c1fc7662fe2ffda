"""Decoding over keys and values that are stored as they are, with their number on the device."""
