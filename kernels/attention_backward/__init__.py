"""Gradients of attention over the key tiles that its queries see."""
