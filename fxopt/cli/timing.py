"""What `fxopt bench` measures: the original against a saved result, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fxopt.decide.calibration import Batch
from fxopt.decide.runs import (
    DECODE_STEPS,
    DECODER_IDS,
    calls,
    peak_temporaries,
    prefilled,
    prompt_of,
)
from fxopt.decide.verify import alternately, held_bytes, weight_bytes
from fxopt.ir.units import format_value
from fxopt.ir.workload import Generate, named, parts, scenarios
from fxopt.progress import Progress
from fxopt.request import Request
from fxopt.show.rows import table

MEMORY = ("weights", "kv_cache", "temporaries", "memory")


@dataclass(frozen=True)
class Estimate:
    """A median and the 95 % interval around it."""

    median: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        return Estimate(self.median * factor, self.low * factor, self.high * factor)

    def plus(self, other: Estimate) -> Estimate:
        """The sum; its interval is at least as wide as it need be."""
        return Estimate(self.median + other.median, self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Timed:
    """Seconds of one call, and optimised / original as measured pair by pair."""

    original: Estimate
    optimised: Estimate
    ratio: Estimate


@dataclass(frozen=True)
class Bench:
    """`latency` in seconds by call, decoding a step; "workload" is all of them as often as the
    workload makes them. `bytes_` are of original and optimised, by what holds them: `kv_cache`
    at the last generated token; `temporaries` at the peak of the largest call.
    """

    latency: dict[str, Timed]
    bytes_: dict[str, tuple[float, float]]

    def document(self) -> dict[str, Any]:
        memory = {
            name: {"original": before, "optimised": after}
            for name, (before, after) in self.bytes_.items()
        }
        return {
            "latency": {name: asdict(timed) for name, timed in self.latency.items()},
            "bytes": memory,
        }

    def __str__(self) -> str:
        lines = [
            [
                name,
                _seconds(timed.original),
                _seconds(timed.optimised),
                f"{timed.ratio.median:.2f}x ({timed.ratio.low:.2f}-{timed.ratio.high:.2f})",
            ]
            for name, timed in self.latency.items()
        ]
        for name, (before, after) in self.bytes_.items():
            ratio = f"{after / before:.2f}x" if before else ""
            lines.append([name, *(format_value(b, "bytes") for b in (before, after)), ratio])
        heads = ["median (95 % interval)", "original", "optimised", "ratio"]
        return table(heads, lines)


def measure(request: Request, optimised: nn.Module, seconds: float, progress: Progress) -> Bench:
    """Time each call of the request's workload for about `seconds`, and weigh both modules."""
    original, work, example = request.model, request.workload, request.example
    device = next((p.device for p in original.parameters()), torch.device("cpu"))
    latency: dict[str, Timed] = {}
    with progress.stage("timing", len(scenarios(work))) as advance:
        pairs = zip(calls(original, work, example), calls(optimised, work, example), strict=True)
        for (name, first), (_, second) in pairs:
            latency[name] = timed(alternately(first, second, device, seconds=seconds))
            advance()
    for name, part in parts(work).items():
        if isinstance(part, Generate):
            prefill, decode = named(name, "prefill"), named(name, "decode")
            latency[decode] = _scaled(latency[decode], 1 / DECODE_STEPS)
            steps = _scaled(latency[decode], part.new_tokens)
            latency[name or "workload"] = together(latency[prefill], steps)
    with progress.stage("weighing"):
        sizes = [_bytes(module, request, device) for module in (original, optimised)]
    before, after = sizes
    return Bench(latency, {name: (before[name], after[name]) for name in MEMORY if before[name]})


def timed(pairs: Sequence[tuple[float, float]]) -> Timed:
    """Medians of the seconds of paired calls, and of their ratios."""
    return Timed(
        median([a for a, _ in pairs]),
        median([b for _, b in pairs]),
        median([b / a for a, b in pairs]),
    )


def median(values: Sequence[float]) -> Estimate:
    """The median with its 95 % interval by order statistics, which assumes no distribution."""
    ordered, count = sorted(values), len(values)
    half, spread = count / 2, 0.98 * math.sqrt(count)
    low = max(math.floor(half - spread), 0)
    high = min(math.ceil(half + spread), count - 1)
    return Estimate(ordered[count // 2], ordered[low], ordered[high])


def _scaled(timed: Timed, factor: float) -> Timed:
    return Timed(timed.original.times(factor), timed.optimised.times(factor), timed.ratio)


def together(first: Timed, second: Timed) -> Timed:
    """Both one after the other: the ratios weighted by what the original takes."""
    original, optimised = (
        first.original.plus(second.original),
        first.optimised.plus(second.optimised),
    )
    weighted = first.ratio.times(first.original.median).plus(
        second.ratio.times(second.original.median)
    )
    return Timed(original, optimised, weighted.times(1 / original.median))


def _bytes(module: nn.Module, request: Request, device: torch.device) -> dict[str, float]:
    work, example = request.workload, request.example
    held = max(
        _cache_bytes(module, example, part) if isinstance(part, Generate) else 0
        for part in parts(work).values()
    )
    rows = {
        "weights": float(weight_bytes(module)),
        "kv_cache": float(held),
        "temporaries": float(peak_temporaries(module, work, example, device)),
    }
    return {**rows, "memory": sum(rows.values())}


def _cache_bytes(module: nn.Module, example: Batch, work: Generate) -> int:
    """Bytes of the cache at the last generated token, as a budget counts them: in one call of as
    many tokens, with a cache for no more of them where the module makes its own."""
    longer = replace(work, prompt=work.prompt + work.new_tokens)
    encoder = DECODER_IDS in example
    call = prompt_of(example, work if encoder else longer, decoded=work.new_tokens)
    batch, length = call[DECODER_IDS if encoder else "input_ids"].shape
    make: Any = getattr(module, "make_cache", None)
    if make is not None and getattr(getattr(module, "program", None), "reason", None) is None:
        call["past_key_values"] = make(batch, length)
    return held_bytes(prefilled(module, call).past_key_values)


def _seconds(value: Estimate) -> str:
    low, high = format_value(value.low, "s"), format_value(value.high, "s")
    return f"{format_value(value.median, 's')} ({low} - {high})"
