"""Cost models: an op call and the facts of a device in, seconds and bytes out."""
