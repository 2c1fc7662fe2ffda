"""Costs measured on the device at hand, each distinct call once, kept on disk as JSON."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fxopt.ir.cost import Cost, OpCall
from fxopt.ir.units import so_many

from .hardware import Device, cache_folder, read_json, write_json
from .roofline import Roofline
from .sources import digest
from .timing import Timing, time_call, time_calls

logger = logging.getLogger("fxopt")

ABSURD = 50
"""What takes so many times its prior was disturbed for as long as it was timed: not kept."""
FLUSHED, MOST_CALLS, LEAST_CALLS = 1.5, 256, 8
"""How many times the last cache is filled at most between two runs; on a GPU, how many calls are
timed in turn at most and at least."""
NEAR, NEIGHBOURS, LEAST_DOUBT = 1.0, 4, 0.03
"""Sizes whose flops and bytes differ by a factor of e count as near; how many tell of others; the
least error of what they tell, as a share."""

Peak = Callable[[Callable[[], Any], torch.device], int]


class Point(NamedTuple):
    """A measured call: its flops and bytes, its prior, its seconds on device and host, and the
    bytes that its op held beside its output (-1: not measured)."""

    flops: float
    bytes: float
    prior: float
    seconds: float
    host: float
    workspace: float = -1.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of a call that was not run, from others of its family; `doubt` is one standard
    error."""

    seconds: float
    doubt: float


_told: set[Path] = set()
"""Files of which it was said, once is enough, that timings were disturbed."""


class Measured:
    """Times a call's own closure; where that would take too long, or cannot be, others of its
    family tell (`between`), or the roofline, as far beyond it as calls of other families took.

    `limit` is the longest predicted call, in seconds, that is worth running, and `left` the seconds
    that running calls may take from now on, in all. `working_set` are the
    bytes that a whole call of the model reads: so many, or what fills the caches, are read between
    two runs, so that weights come from where they come from in the model. `peak` measures the bytes
    that a call allocates at most, those that it returns included. Results are keyed by the call's
    key, the source of its kernels, the device, torch's version and thread count; `save` writes new
    ones. Those that were disturbed are used, counted in `disturbed`, and not written.
    """

    def __init__(
        self,
        device: Device,
        dtype: str,
        *,
        limit: float = 0.5,
        left: float = math.inf,
        working_set: int = 0,
        peak: Peak | None = None,
        folder: Path | None = None,
    ) -> None:
        self.prior = Roofline(device, dtype)
        self.limit = limit
        self.left = left
        self.measured: set[str] = set()
        self.disturbed: set[str] = set()
        self._peak = peak
        self._device = torch.device(device.kind)
        most = int(FLUSHED * device.last_cache)
        # powers of two, so that models of about a size share what was measured
        self._between = min(1 << (working_set - 1).bit_length(), most) if working_set > 1 else 0
        identity = f"{device.name}|{torch.__version__}|{device.threads}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._path = (folder or cache_folder()) / f"calls-{name}.json"
        self._known = _points(read_json(self._path))
        self._passing: set[str] = set()
        self._dirty = False

    def __call__(self, call: OpCall) -> Cost:
        prior = self.prior(call)
        key = self._key(call)
        point = self._known.get(key)
        if point is None and call.run is not None and self._worth_running(call, prior.seconds):
            began = time.perf_counter()
            timing, workspace = self._time(call.run, call, prior.seconds * call.share)
            self.left -= time.perf_counter() - began
            seconds, host = timing.seconds / call.share, timing.host / call.share
            point = Point(call.flops, _moved(call), prior.seconds, seconds, host, workspace)
            self._known[key] = point
            for grouped in ("_families", "_others"):  # anew where they are asked for next
                self.__dict__.pop(grouped, None)
            if timing.disturbed or seconds > ABSURD * prior.seconds:
                self.disturbed.add(call.key)
                self._passing.add(key)
            self._dirty = True
        if point is not None:
            self.measured.add(call.key)
            held = prior.temporary_bytes if point.workspace < 0 else int(point.workspace)
            return replace(prior, seconds=point.seconds, host=point.host, temporary_bytes=held)
        found = self.between(call)
        if found is None:
            return replace(prior, seconds=prior.seconds * self._slowness(call))
        return replace(prior, seconds=found.seconds, doubt=found.doubt)

    def _worth_running(self, call: OpCall, prior: float) -> bool:
        return self.left > 0 and prior * call.share <= self.limit

    def between(self, call: OpCall) -> Estimate | None:
        """Seconds of a call by the nearest of its family that were measured; None without any.

        Interpolated is what each took beyond the roofline, in the logarithms of flops and bytes,
        by distance (Shepard, 1968). The error is what the neighbours disagree in, and grows
        with the distance to them.
        """
        others = self._families.get(self._family(call), [])
        if not call.family or not others:
            return None
        here = (call.flops, _moved(call))
        near = sorted((_distance(here, p), i) for i, p in enumerate(others))[:NEIGHBOURS]
        weights = [1 / (distance + 1e-3) ** 2 for distance, _ in near]
        excess = [math.log(others[i].seconds / others[i].prior) for _, i in near]
        total = sum(weights)
        mean = sum(w * e for w, e in zip(weights, excess, strict=True)) / total
        spread = sum(w * (e - mean) ** 2 for w, e in zip(weights, excess, strict=True)) / total
        # one neighbour alone has nothing to disagree with: its distance tells
        doubt = math.hypot(LEAST_DOUBT, math.sqrt(spread), 0.5 * near[0][0] / NEAR)
        seconds = self.prior(call).seconds * math.exp(mean)
        return Estimate(seconds, doubt * seconds)

    def _slowness(self, call: OpCall) -> float:
        """How many times the roofline a call of whose family none was timed takes at least: the
        least of what the nearest calls of other families took.

        On a machine that is slower than when it was probed, or busy, what was not timed would else
        look faster than what was, which its op does not earn.
        """
        here = (call.flops, _moved(call))
        near = sorted(self._others, key=lambda point: _distance(here, point))[:NEIGHBOURS]
        return max(min((p.seconds / p.prior for p in near), default=1.0), 1.0)

    def save(self) -> None:
        """Write what was measured since the last save."""
        if not self._dirty:
            return
        lasting = {k: list(v) for k, v in self._known.items() if k not in self._passing}
        stored = read_json(self._path)
        write_json(self._path, {**(stored if isinstance(stored, dict) else {}), **lasting})
        self._dirty = False
        if self.disturbed and self._path not in _told:
            _told.add(self._path)
            logger.warning(
                "disturbed by what else runs here: %s, used now and measured again by the next run",
                so_many(len(self.disturbed), "op timing"),
            )

    def _key(self, call: OpCall) -> str:
        return f"{self._family(call)}|{call.key}"

    def _family(self, call: OpCall) -> str:
        return f"{call.family}|{digest(call.op)}|{self._between}"

    @cached_property
    def _families(self) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for key, point in self._known.items():
            if key not in self._passing and point.prior > 0 and point.seconds > 0:
                found.setdefault("|".join(key.split("|")[:3]), []).append(point)
        return found

    @cached_property
    def _others(self) -> list[Point]:
        """What was timed between the same reads, disturbed or not."""
        return [
            point
            for key, point in self._known.items()
            if key.split("|")[2:3] == [str(self._between)] and point.prior > 0 and point.seconds > 0
        ]

    def _time(
        self, run: Callable[[Any], Callable[[], Any]], call: OpCall, prior: float
    ) -> tuple[Timing, float]:
        """The timing of a call, and its workspace."""
        with torch.no_grad():
            copies = self._copies(call) if self._device.type == "cuda" else 1
            calls = [run(self._device) for _ in range(copies)]
            held = self._workspace(calls[0])
            if self._device.type != "cuda":
                flush = self._flush if self._between else None
                return time_call(calls[0], self._device, expected=prior, before=flush), held
            times = -(-LEAST_CALLS // len(calls)) if prior < 1e-3 else 1
            return time_calls(calls * times), held

    def _workspace(self, call: Callable[[], Any]) -> float:
        if self._peak is None:
            return -1.0
        call()  # what only the first call allocates is none
        output: list[Any] = []
        held = self._peak(lambda: output.append(call()), self._device)
        returned = (t.nbytes for t in tree_leaves(output) if isinstance(t, torch.Tensor))
        return float(max(held - sum(returned), 0))

    def _copies(self, call: OpCall) -> int:
        """Calls in turn that read `_between` bytes until the first comes again."""
        size = max(call.bytes_read * call.share, 1.0)
        return min(MOST_CALLS, 1 + int(self._between / size))

    @cached_property
    def _buffer(self) -> torch.Tensor:
        # of ones: pages of zeros that nothing wrote are one page
        return torch.ones(max(self._between // 4, 1))

    def _flush(self) -> None:
        """Read what the model reads between two runs of the next call. What is written would have
        to be written back while the call is timed."""
        self._buffer.sum()


def _moved(call: OpCall) -> float:
    return call.bytes_read + call.bytes_written


def _distance(here: tuple[float, float], point: Point) -> float:
    there = (point.flops, point.bytes)
    pairs = zip(here, there, strict=True)
    return math.hypot(*(math.log((a + 1) / (b + 1)) for a, b in pairs))


def _points(stored: Any) -> dict[str, Point]:
    """What a file holds; entries of another form are left out."""
    if not isinstance(stored, dict):
        return {}
    entries: dict[str, Any] = stored
    return {
        key: Point(*map(float, value))
        for key, value in entries.items()
        if isinstance(value, list) and len(value) == len(Point._fields)
    }
