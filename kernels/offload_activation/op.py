"""`fxopt::offload` and its inverse: on CUDA, copies on a stream of their own.

Memory that a copy reads or writes stays alive by the calls that wait for it (`landed`, `arrived`
take it), so the allocator need not know of the second stream: what is freed after a wait is freed
in the order of the stream that computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels._register import register

from . import reference
from .pool import Pool

_flying: dict[int, Any] = {}
"""The event at the end of each copy that nobody has waited for, by where it writes."""


@cache
def pool_of(device: torch.device) -> Pool:
    """The host memory of the copies of one device."""
    return Pool()


@cache
def _stream_of(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _offload(x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        host = pool_of(x.device).take(x.nbytes, pin=True).view(x.dtype)
        _copy(host, reference.in_memory_order(x), x.device)
    return host


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((x.numel(),), device="cpu")


offload = register("offload", "(Tensor x) -> Tensor", reference.offload, fake=_fake, cuda=_offload)


def landed(host: Tensor, x: Tensor) -> Tensor:
    """`host`, once the copy from `x` has ended: from here on the memory of x may be used."""
    if x.is_cuda:
        _wait(host, x.device)
    return host


def reload(host: Tensor, size: Sequence[int], stride: Sequence[int], device: str) -> Tensor:
    """Start to copy back what `offload` took; nothing may read it before `arrived`."""
    if device == "cpu":
        return reference.reload(host, size, stride, device)
    out = torch.empty_strided(size, stride, dtype=host.dtype, device=device)
    with torch.cuda.device_of(out):
        _copy(reference.in_memory_order(out), host, out.device)
    return out


def arrived(out: Tensor, host: Tensor) -> Tensor:
    """`out`, once the copy from `host` has ended."""
    if out.is_cuda:
        _wait(out, out.device)
    return out


def _copy(target: Tensor, source: Tensor, device: torch.device) -> None:
    side = _stream_of(device)
    # what is read was made, and what is written was last used, by what is queued so far
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    event: Any = torch.cuda.Event()
    event.record(side)
    _flying[target.data_ptr()] = event


def _wait(target: Tensor, device: torch.device) -> None:
    torch.cuda.current_stream(device).wait_event(_flying.pop(target.data_ptr()))
