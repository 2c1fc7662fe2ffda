"""What Triton kernels share. Importing this package loads no triton; `common` does."""

from importlib.util import find_spec

AVAILABLE: bool = find_spec("triton") is not None
