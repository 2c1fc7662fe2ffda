"""What Triton kernels share. Importing this package loads no triton; `common` does."""

from functools import cache
from importlib.util import find_spec

import torch

AVAILABLE: bool = find_spec("triton") is not None


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may ask for."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
