"""Facts about the device at hand, probed once and kept on disk."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """What one device can do. Rates are achieved ones, measured, not the vendor's.

    `bandwidth` in bytes/s (read plus written), `matmul_rate` in flop/s by dtype name,
    `launch_seconds` for one eager op, `memory_bytes` in all, `threads` for a CPU. `host_link` in
    bytes/s between the device and pinned host memory, the slower direction; 0 for a CPU.
    """

    name: str
    kind: str
    bandwidth: float
    matmul_rate: dict[str, float]
    launch_seconds: float
    memory_bytes: int
    threads: int
    probed: str
    host_link: float = 0.0

    def rate(self, dtype: str) -> float:
        """flop/s of a large matrix product; an unknown dtype counts as the slowest."""
        return self.matmul_rate.get(dtype, min(self.matmul_rate.values()))


def cache_folder() -> Path:
    """Where measurements live: `$FXOPT_CACHE_DIR`, or the user's cache folder."""
    return Path(os.environ.get("FXOPT_CACHE_DIR") or user_cache_dir("fxopt"))


def write_json(path: Path, data: Any) -> None:
    """Write through a temporary name, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, sort_keys=True))
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The stored value, or None when there is none or it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def device_name(device: torch.device) -> str:
    """The marketing name of a GPU, or the processor's model and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} x{torch.get_num_threads()}"


def probe(device: torch.device | str = "cpu", *, refresh: bool = False) -> Device:
    """Facts of `device`, read from disk when this machine was probed before."""
    device = torch.device(device)
    name = device_name(device)
    path = cache_folder() / f"device-{_slug(name)}.json"
    stored = None if refresh else read_json(path)
    if isinstance(stored, dict) and stored.get("torch") == torch.__version__:
        known = Device(**stored["facts"])
        if known.host_link or known.kind == "cpu":
            return known
    facts = _measure(device, name)
    write_json(path, {"torch": torch.__version__, "facts": asdict(facts)})
    return facts


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that a host clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


DOUBTFUL = 5
RUNS, LONGEST = 40, 0.4
"""A call that takes so many times what was expected is run again: so often, or so many seconds."""


def time_call(
    call: Callable[[], Any],
    device: torch.device,
    *,
    seconds: float = 0.05,
    expected: float = float("inf"),
) -> float:
    """Seconds of `call`: the lower quartile over repeats that fill about `seconds`, at least 5.

    What else runs on the machine only ever adds time, so the fast repeats tell more. It adds most
    where threads wait for each other, a thousand times what a small call takes: one that is far
    from `expected` is tried until a run was left alone.
    """
    call()
    times = _repeated(call, device, seconds, 200)
    found = times[len(times) // 4]
    if found <= DOUBTFUL * expected:
        return found
    return min(times[0], _repeated(call, device, LONGEST, RUNS)[0])


def _repeated(
    call: Callable[[], Any], device: torch.device, seconds: float, most: int
) -> list[float]:
    """Seconds of repeated calls, at least 5, the fastest first."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < most):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)


def _measure(device: torch.device, name: str) -> Device:
    cuda = device.type == "cuda"
    size = 2**28 if cuda else 2**25
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)
    small = torch.ones(8, device=device)
    return Device(
        name=name,
        kind=device.type,
        bandwidth=2 * source.nbytes / copy,
        matmul_rate={str(d).removeprefix("torch."): _matmul_rate(device, d) for d in _DTYPES},
        launch_seconds=time_call(lambda: small + small, device, seconds=0.02),
        memory_bytes=_memory(device),
        threads=torch.get_num_threads(),
        probed=date.today().isoformat(),
        host_link=_host_link(device) if cuda else 0.0,
    )


def _host_link(device: torch.device) -> float:
    """bytes/s of copies of 256 MiB between the device and pinned host memory."""
    there = torch.ones(2**28, dtype=torch.uint8, device=device)
    here = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    out = time_call(lambda: here.copy_(there, non_blocking=True), device)
    back = time_call(lambda: there.copy_(here, non_blocking=True), device)
    return there.nbytes / max(out, back)


def host_memory() -> int:
    """Bytes that the host can still give, without swapping where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = {line.split(":")[0]: line.split() for line in lines}
    return 1024 * int(known["MemAvailable"][1])


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / time_call(lambda: a @ b, device)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-").lower()
