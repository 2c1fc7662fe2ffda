"""Rewrites of attention: which keys each head reads."""
