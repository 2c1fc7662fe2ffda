"""Rewrites of the KV cache: how keys and values of a head are stored while generating."""
