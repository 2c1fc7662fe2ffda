"""Measurements of a realised module: bytes it holds, seconds it takes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .disturbed import Spread


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {
        _storage(t): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def held_bytes(owner: Any) -> int:
    """Bytes of the tensors reachable from `owner` through attributes and containers, each
    storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [owner]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[_storage(item)] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return sum(storages.values())


@dataclass(frozen=True)
class Timing:
    """Seconds of two calls measured in turn: medians, the ratio's upper 95 % bound, and how far the
    runs of each lie apart (None for the sum of several calls)."""

    first: float
    second: float
    ratio_upper: float
    spreads: tuple[Spread, Spread] | None = None

    def per(self, count: int) -> Timing:
        """That of one of `count` equal calls that each run consists of."""
        spreads = self.spreads and (self.spreads[0].per(count), self.spreads[1].per(count))
        return Timing(self.first / count, self.second / count, self.ratio_upper, spreads)


def compare(
    first: Callable[[], Any],
    second: Callable[[], Any],
    device: torch.device,
    *,
    seconds: float = 2.0,
    least: int = 5,
) -> Timing:
    """Time two calls alternately, so that what disturbs one disturbs the other."""
    times = alternately(first, second, device, seconds=seconds, least=least)
    a = sorted(t for t, _ in times)
    b = sorted(t for _, t in times)
    ratios = torch.tensor([y / x for x, y in times], dtype=torch.float64)
    # 95 % bound of the median by order statistics, without assuming a distribution
    rank = min(len(times) - 1, int(len(times) / 2 + 0.98 * len(times) ** 0.5))
    upper = ratios.sort().values[rank].item()
    return Timing(a[len(a) // 2], b[len(b) // 2], upper, (Spread.of(a), Spread.of(b)))


def alternately(
    first: Callable[[], Any],
    second: Callable[[], Any],
    device: torch.device,
    *,
    seconds: float,
    least: int = 5,
) -> list[tuple[float, float]]:
    """Seconds of pairs of calls, after one of each to warm up: at least `least` pairs, at most
    100, and no more than `seconds` in all."""
    first()
    second()
    times: list[tuple[float, float]] = []
    deadline = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < deadline and len(times) < 100):
        times.append((_time(first, device), _time(second, device)))
    return times


def _time(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def peak_live_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of bytes allocated by `call` beyond what was alive before it.

    On CUDA the allocator's own statistic; on a CPU the storages that operations make.
    """
    with Watch(device) as watch:
        call()
    return watch.peak


class Watch:
    """Bytes alive beyond what was alive when it was entered; `peak` is the most since `mark`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages = None if device.type == "cuda" else _LiveStorages()
        self._before = 0

    def __enter__(self) -> Watch:
        if self._storages is not None:
            self._storages.__enter__()
            return self
        torch.cuda.synchronize(self._device)
        self.mark()
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._storages is not None:
            self._storages.__exit__(*error)
        else:
            torch.cuda.synchronize(self._device)

    def mark(self) -> None:
        """Count the peak from here on."""
        if self._storages is not None:
            self._storages.mark()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak(self) -> int:
        if self._storages is not None:
            return self._storages.peak
        return torch.cuda.max_memory_allocated(self._device) - self._before


_CPU: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # pyright: ignore[reportPrivateUsage]


class _LiveStorages(TorchDispatchMode):
    """Counts storages that operations return, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def mark(self) -> None:
        self.peak = self._now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func.namespace == "fxopt":
            # what our own ops allocate inside counts as well
            with self:
                output = func.redispatch(_CPU, *args, **(kwargs or {}))
        else:
            output = func(*args, **(kwargs or {}))
        for tensor in self._fresh(tree_leaves(output), inputs):
            self._add(tensor)
        return output

    def _fresh(self, leaves: Iterable[Any], inputs: set[int]) -> list[Tensor]:
        return [
            t
            for t in leaves
            if isinstance(t, Tensor)
            and _storage(t) not in inputs
            and _storage(t) not in self._known
        ]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _storage(tensor), storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
