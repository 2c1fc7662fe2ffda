"""Data and protocols that every other part speaks; imports nothing else of fxopt."""
