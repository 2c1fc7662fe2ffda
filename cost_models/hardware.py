"""Facts about the device at hand, probed once and kept on disk."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir

FEW_ROWS = 16
"""Rows of the products of `Device.few_rows_rate`."""


@dataclass(frozen=True)
class Device:
    """What one device can do. Rates are achieved ones, measured, not the vendor's.

    `bandwidth` in bytes/s (read plus written), `matmul_rate` in flop/s of a large product by the
    dtype's name, `few_rows_rate` the same of `FEW_ROWS` rows, whose weight comes from memory.
    `launch_seconds` for one eager op, `graph_seconds` for one in a CUDA graph (0 for a CPU).
    `memory_bytes` in all, `threads` for a CPU, `thread_bandwidth` of one of them.
    `cache_bytes` by level ("L2"), the last level last, and the bandwidth of what stays in that.
    `to_host` and `to_device` in bytes/s through pinned memory; 0 for a CPU.
    """

    name: str
    kind: str
    bandwidth: float
    matmul_rate: dict[str, float]
    launch_seconds: float
    memory_bytes: int
    threads: int
    probed: str
    to_host: float = 0.0
    to_device: float = 0.0
    few_rows_rate: dict[str, float] = field(default_factory=dict)
    graph_seconds: float = 0.0
    cache_bytes: dict[str, int] = field(default_factory=dict)
    cache_bandwidth: float = 0.0
    thread_bandwidth: float = 0.0

    def rate(self, dtype: str) -> float:
        """flop/s of a large matrix product; an unknown dtype counts as the slowest."""
        return self.matmul_rate.get(dtype, min(self.matmul_rate.values()))

    @property
    def host_link(self) -> float:
        """bytes/s between device and host, the slower direction; 0 for a CPU."""
        return min(self.to_host, self.to_device)

    @property
    def last_cache(self) -> int:
        """Bytes of the last level of cache; 0 where it is not known."""
        return next(reversed(self.cache_bytes.values()), 0)


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
    known = None if refresh else _stored(path)
    if known is not None:
        return known
    facts = _measure(device, name)
    write_json(path, {"torch": torch.__version__, "facts": asdict(facts)})
    return facts


def _stored(path: Path) -> Device | None:
    """The facts in a file; None where another torch, or an fxopt that knew others, left them."""
    found = read_json(path)
    facts: Any = found.get("facts") if isinstance(found, Mapping) else None
    if not isinstance(facts, dict) or {*facts} != {f.name for f in fields(Device)}:
        return None
    # JSON sorts names; a level of cache is below the next larger one
    facts["cache_bytes"] = dict(sorted(facts["cache_bytes"].items(), key=lambda item: item[1]))
    return Device(**facts) if found.get("torch") == torch.__version__ else None


def _measure(device: torch.device, name: str) -> Device:
    from .probing import facts_of

    return facts_of(device, name)


def host_memory() -> int:
    """Bytes that the host can still give, without swapping where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = {line.split(":")[0]: line.split() for line in lines}
    return 1024 * int(known["MemAvailable"][1])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-").lower()
