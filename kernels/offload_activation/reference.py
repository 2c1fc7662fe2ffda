"""What copies to the host and back are where there is no device: plain copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels.pack_activation.reference import is_dense


def offload(x: Tensor) -> Tensor:
    """The values of `x` [values] in the order of memory, on the host. Raises ValueError
    where `x` has gaps."""
    return in_memory_order(x).to("cpu", copy=True)


def reload(host: Tensor, size: Sequence[int], stride: Sequence[int], device: str) -> Tensor:
    """The tensor that `offload` took, on `device`."""
    out = torch.empty_strided(size, stride, dtype=host.dtype, device=device)
    in_memory_order(out).copy_(host)
    return out


def in_memory_order(x: Tensor) -> Tensor:
    """A view of all memory of a tensor without gaps, in one dimension."""
    if not is_dense(x.shape, x.stride()):
        raise ValueError(f"offload: strides {list(x.stride())} of {list(x.shape)} leave gaps")
    return x.as_strided((x.numel(),), (1,))
