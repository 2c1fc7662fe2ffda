"""The facts of a device, measured: a second or two, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .hardware import FEW_ROWS, Device
from .timing import Call, time_call, time_calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
LINK_BYTES = 2**28
LAUNCHES = 200
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def facts_of(device: torch.device, name: str) -> Device:
    """What `device` can do, by running it."""
    with torch.no_grad():
        if device.type == "cuda":
            with torch.cuda.device(device):
                return _cuda(torch.device("cuda", torch.cuda.current_device()), name)
        return _cpu(device, name)


def _cuda(device: torch.device, name: str) -> Device:
    properties = torch.cuda.get_device_properties(device)
    cache = int(getattr(properties, "L2_cache_size", 0))
    small = torch.ones(8, device=device)
    launches = time_calls([lambda: small + small] * LAUNCHES)
    to_host, to_device = _links(device)
    return Device(
        name=name,
        kind="cuda",
        bandwidth=_copied(device, 2**30),
        matmul_rate=_rates(device, 8192, 8192),
        launch_seconds=launches.host,
        memory_bytes=properties.total_memory,
        threads=torch.get_num_threads(),
        probed=date.today().isoformat(),
        to_host=to_host,
        to_device=to_device,
        few_rows_rate=_rates(device, FEW_ROWS, 8192),
        graph_seconds=launches.seconds,
        cache_bytes={"L2": cache} if cache else {},
        cache_bandwidth=_copied(device, cache // 4) if cache else 0.0,
    )


def _cpu(device: torch.device, name: str) -> Device:
    small = torch.ones(8)
    caches = cpu_caches()
    last = next(reversed(caches.values()), 2**20)
    large = max(2**27, 4 * last)
    threads = torch.get_num_threads()
    bandwidth = _copied(device, large)
    torch.set_num_threads(1)
    try:
        one = _copied(device, large)
    finally:
        torch.set_num_threads(threads)
    return Device(
        name=name,
        kind="cpu",
        bandwidth=bandwidth,
        matmul_rate=_rates(device, 512, 512),
        launch_seconds=time_call(lambda: small + small, device, seconds=0.02).seconds,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        threads=threads,
        probed=date.today().isoformat(),
        few_rows_rate=_rates(device, FEW_ROWS, 4096),
        cache_bytes=caches,
        cache_bandwidth=_copied(device, last // 4),
        thread_bandwidth=one,
    )


def cpu_caches(folder: Path = _CACHES) -> dict[str, int]:
    """Bytes of the caches of data of a core by level, the smallest first; empty where the system
    does not say."""
    found: dict[str, int] = {}
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size = (
                (index / part).read_text().strip() for part in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = 1024 * int(size[:-1])
    return found


def _seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        return time_calls([call] * 4).seconds
    return time_call(call, device).seconds


def _copied(device: torch.device, size: int) -> float:
    """bytes/s, read plus written, of a copy of `size` bytes."""
    source = torch.ones(max(size // 4, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _links(device: torch.device) -> tuple[float, float]:
    """bytes/s from the device to pinned host memory, and back."""
    there = torch.ones(LINK_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    out = _seconds(lambda: here.copy_(there, non_blocking=True), device)
    back = _seconds(lambda: there.copy_(here, non_blocking=True), device)
    return LINK_BYTES / out, LINK_BYTES / back


def _rates(device: torch.device, rows: int, size: int) -> dict[str, float]:
    """flop/s of [rows, size] x [size, size] by dtype; one that the device lacks has none."""
    found: dict[str, float] = {}
    for dtype in DTYPES if device.type == "cuda" else DTYPES[:-1]:  # fp8 is for tensor cores
        try:
            call = _product(device, dtype, rows, size)
            call()
            found[str(dtype).removeprefix("torch.")] = 2.0 * rows * size**2 / _seconds(call, device)
        except (RuntimeError, ValueError):
            continue
    return found


def _product(device: torch.device, dtype: torch.dtype, rows: int, size: int) -> Callable[[], Any]:
    """A product of random matrices; the second as a layer's weight lies, transposed."""
    a, b = torch.randn(rows, size, device=device), torch.randn(size, size, device=device)
    if dtype.is_floating_point and dtype.itemsize > 1:
        x, weight = a.to(dtype), b.to(dtype)
        return lambda: torch.nn.functional.linear(x, weight)
    if dtype == torch.int8:
        codes, others = (100 * a).clamp(-127, 127).to(dtype), (100 * b).clamp(-127, 127).to(dtype)
        if rows < 32 and device.type == "cuda":  # the library's least
            codes = torch.cat([codes] * (32 // rows))
        product: Callable[..., Tensor] = torch._int_mm  # pyright: ignore
        return lambda: product(codes, others.T)
    one = torch.ones((), device=device)
    left, right = a.to(dtype), b.to(dtype)
    scaled: Callable[..., Tensor] = torch._scaled_mm  # pyright: ignore
    return lambda: scaled(left, right.T, one, one, out_dtype=torch.bfloat16)
