"""Rewrites of linear layers: one file a structure; `projection` and `dense` are what they share."""
