"""Rewrites of large intermediates: which of them exist, and for how many tokens at once."""
