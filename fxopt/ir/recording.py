"""Whether calls are made to be repeated, as opposed to once."""

from __future__ import annotations

import torch
from torch import Tensor


def is_recorded(x: Tensor) -> bool:
    """Whether a call on `x` is traced or captured in a CUDA graph: what is repeated later must not
    hold the value of a length or of a mask, and may not wait for the device."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
