"""Costs measured on the device at hand, each distinct call once, kept on disk as JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fxopt.ir.cost import Cost, OpCall

from .hardware import Device, cache_folder, read_json, time_call, write_json
from .roofline import Roofline

ABSURD = 50
"""What takes so many times its prior was disturbed for as long as it was timed: not kept."""


class Measured:
    """Times a call's own closure; falls back to the roofline where that would take too long.

    `limit` is the longest predicted call, in seconds, that is worth running. Results are keyed
    by the call's key, the device, torch's version and thread count; `save` writes new ones.
    """

    def __init__(
        self, device: Device, dtype: str, *, limit: float = 0.5, folder: Path | None = None
    ) -> None:
        self.prior = Roofline(device, dtype)
        self.limit = limit
        self.measured: set[str] = set()
        self._device = torch.device(device.kind)
        identity = f"{device.name}|{torch.__version__}|{device.threads}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._path = (folder or cache_folder()) / f"costs-{digest}.json"
        stored = read_json(self._path)
        self._seconds: dict[str, float] = stored if isinstance(stored, dict) else {}
        self._passing: set[str] = set()
        self._dirty = False

    def __call__(self, call: OpCall) -> Cost:
        prior = self.prior(call)
        seconds = self._seconds.get(call.key)
        if seconds is None and call.run is not None and prior.seconds <= self.limit:
            run = call.run(self._device)
            seconds = time_call(run, self._device, expected=prior.seconds)
            self._seconds[call.key] = seconds
            if seconds > ABSURD * prior.seconds:
                self._passing.add(call.key)
            self._dirty = True
        if seconds is None:
            return prior
        self.measured.add(call.key)
        return Cost(seconds, prior.weight_bytes, prior.state_bytes, prior.temporary_bytes)

    def save(self) -> None:
        """Write what was measured since the last save."""
        if self._dirty:
            stored = read_json(self._path)
            known = stored if isinstance(stored, dict) else {}
            lasting = {k: v for k, v in self._seconds.items() if k not in self._passing}
            write_json(self._path, {**known, **lasting})
            self._dirty = False
