"""Seconds of a call: what the device takes, and what the host takes to ask for it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger("fxopt")

Call = Callable[[], Any]

DOUBTFUL = 5
RUNS, LONGEST = 40, 0.4
"""A call that takes so many times what was expected is run again: so often, or so many seconds."""
BUSY, AGAIN = 0.3, 2
"""Repeats whose middle half spreads wider than this share of the median were disturbed; they are
made so many times more."""
LEAST, LEAST_LONG = 5, 2
"""Repeats at least, and of a call that takes longer than all of them are meant to."""
ISSUED, REPLAYS = 8, 5
"""On a GPU: calls that are issued without waiting, and the replays of the graph of many."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call on the device, and of the host to issue it (0 where it computes itself).

    `spread` is the width of the middle half of the repeats as a share of their median.
    """

    seconds: float
    host: float = 0.0
    spread: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.spread > BUSY


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that a host clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(
    call: Call,
    device: torch.device,
    *,
    seconds: float = 0.05,
    expected: float = float("inf"),
    before: Call | None = None,
) -> Timing:
    """Seconds of `call` by the host's clock: the lower quartile over repeats that fill about
    `seconds`, at least 5 (of what takes longer than that: 2), each after a `before` that is not
    timed.

    What else runs on the machine only ever adds time, so the fast repeats tell more. It adds most
    where threads wait for each other, a thousand times what a small call takes: one that is far
    from `expected` is tried until a run was left alone, and so are repeats that disagree.
    """
    call()
    best = _quartiles(_repeated(call, device, seconds, 200, before))
    for _ in range(AGAIN):
        if not best.disturbed:
            break
        again = _quartiles(_repeated(call, device, seconds, 200, before))
        best = min(best, again, key=lambda timing: timing.spread)
    if best.seconds <= DOUBTFUL * expected:
        return best
    fastest = _repeated(call, device, LONGEST, RUNS, before)[0]
    return Timing(min(best.seconds, fastest), spread=best.spread)


def time_calls(calls: Sequence[Call], *, seconds: float = 0.05, record: bool = True) -> Timing:
    """Seconds of one of `calls` on the current CUDA device, which do the same with other tensors.

    The device's are those of a kernel among others, as in a captured step: all calls are recorded
    in one graph, which is replayed. Where they cannot be recorded, or `record` is False, they are
    what an eager run of all takes, whichever of both is slower.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    for call in (calls[0], *calls):
        call()
    synchronize(device)
    few = max(1, min(ISSUED, int(1e-3 / _issued(calls[:1], 1, device))))
    first = _issued(calls, few, device)
    host = _quartiles(
        sorted(_issued(calls, few, device) for _ in range(_count(few * first, seconds / 2)))
    )
    run = (recorded(calls) if record else None) or (lambda: [call() for call in calls])
    run()
    times = [_by_events(run, device) for _ in range(_count(_by_events(run, device), seconds))]
    found = _quartiles(sorted(t / len(calls) for t in times))
    return Timing(found.seconds, host.seconds, found.spread)


def recorded(calls: Sequence[Call]) -> Call | None:
    """A replay of all calls in turn as one CUDA graph; None where that cannot be."""
    graph, stream = torch.cuda.CUDAGraph(), _capturing(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        logger.debug("timed without a CUDA graph: %s", error)
        return None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@functools.cache
def _capturing(device: int) -> torch.cuda.Stream:
    """One stream for all graphs: a library keeps a workspace of 32 MiB for each that it sees."""
    return torch.cuda.Stream(device)


def _issued(calls: Sequence[Call], count: int, device: torch.device) -> float:
    """Seconds of the host to issue one of `count` calls, while the device has room for them."""
    synchronize(device)
    begin = time.perf_counter()
    for i in range(count):
        calls[i % len(calls)]()
    return (time.perf_counter() - begin) / count


def _by_events(run: Call, device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _count(first: float, seconds: float) -> int:
    return max(REPLAYS, min(50, int(seconds / max(first, 1e-6))))


def _quartiles(times: Sequence[float]) -> Timing:
    """The lower quartile of sorted times."""
    low, middle, high = (times[len(times) * k // 4] for k in (1, 2, 3))
    return Timing(low, spread=(high - low) / middle if middle > 0 else 0.0)


def _least(times: Sequence[float], seconds: float) -> int:
    """How many repeats tell: fewer of long calls, which less disturbs."""
    return LEAST_LONG if min(times, default=0.0) > seconds else LEAST


def _repeated(
    call: Call, device: torch.device, seconds: float, most: int, before: Call | None
) -> list[float]:
    """Seconds of repeated calls, the fastest first."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < _least(times, seconds) or (
        time.perf_counter() < deadline and len(times) < most
    ):
        if before is not None:
            before()
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)
