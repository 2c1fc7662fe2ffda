"""Seconds of a whole call from those of its parts: the slower of device and host, calibrated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .hardware import Device, cache_folder, read_json, write_json

NOISE = 0.03
SCALE_DOUBT, OFFSET_DOUBT = 0.3, 2e-4
"""Before anything was realised: how far parts may be from the whole, as a share, and seconds."""
KEPT = 16
"""Points that are kept of one model and one kind of call."""


@dataclass(frozen=True)
class Parts:
    """Seconds that add up, of the device and of the host that issues its work (0 on a CPU)."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.device + other.device, self.host + other.host)

    def __mul__(self, factor: float) -> Parts:
        return Parts(self.device * factor, self.host * factor)

    @property
    def bound(self) -> float:
        """What a call takes: the host runs ahead of the device, or the device waits for it."""
        return max(self.device, self.host)


@dataclass(frozen=True)
class Fit:
    """Measured seconds as `offset + scale * seconds` of the parts."""

    offset: float = 0.0
    scale: float = 1.0

    def __call__(self, seconds: float) -> float:
        return self.offset + self.scale * seconds


Points = Sequence[tuple[float, float]]
"""(seconds of the parts, seconds measured) of realised plans."""


def fitted(points: Points) -> Fit:
    """The most probable fit, where measurements err by `NOISE` of themselves, and before them the
    parts are as likely to be too slow as too fast: two plans move it, one alone only a little of
    each number. Never negative."""
    known = [(x, y) for x, y in points if x > 0 and y > 0]
    # normal equations of (offset, scale - 1), each point weighed by its own size
    a = 1 / OFFSET_DOUBT**2
    b, c = 0.0, 1 / SCALE_DOUBT**2
    u = v = 0.0
    for x, y in known:
        weight = 1 / (NOISE * y) ** 2
        a, b, c = a + weight, b + weight * x, c + weight * x * x
        u, v = u + weight * (y - x), v + weight * x * (y - x)
    determinant = a * c - b * b
    offset, scale = (c * u - b * v) / determinant, 1 + (a * v - b * u) / determinant
    if offset < 0:
        offset, scale = 0.0, 1 + v / c
    return Fit(offset, max(scale, 0.1))


class Realised:
    """Plans that were realised on a device, on disk: the parts of each kind of call ("decode")
    against what it measured, by the fingerprint of the model's structure."""

    def __init__(self, device: Device, folder: Path | None = None) -> None:
        identity = f"{device.name}|{torch.__version__}|{device.threads}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._path = (folder or cache_folder()) / f"realised-{name}.json"

    def note(self, structure: str, kind: str, parts: float, measured: float) -> None:
        """Keep one more point, of each model the newest `KEPT`."""
        stored = self._stored()
        points = stored.setdefault(kind, {}).setdefault(structure, [])
        stored[kind][structure] = [*points, [parts, measured]][-KEPT:]
        write_json(self._path, stored)

    def fit(self, kind: str, structure: str = "") -> Fit:
        """The fit of one kind of call by the plans of all models but that of `structure`."""
        models = self._stored().get(kind, {})
        others = [points for name, points in models.items() if name != structure]
        return fitted([(x, y) for points in others for x, y in points])

    def _stored(self) -> dict[str, Any]:
        found = read_json(self._path)
        return found if isinstance(found, dict) else {}
