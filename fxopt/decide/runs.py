"""Running a workload on a module as a user would, to time it and to see its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.workload import Generate, Several, Workload, named
from .calibration import Batch
from .verify import Timing, compare, held_bytes, peak_live_bytes

DECODE_STEPS = 8
SECONDS = 2.0
"""For timing one kind of call, unless told."""
DECODER_IDS = "decoder_input_ids"


@dataclass(frozen=True)
class Latency:
    """Seconds of a whole workload and of each of its calls, original against rewritten.

    `ratio_upper` is the upper 95 % bound of rewritten / original.
    """

    before: float
    after: float
    ratio_upper: float
    calls: dict[str, Timing]


def measure_latency(
    original: nn.Module,
    rewritten: nn.Module,
    workload: Workload,
    example: Batch,
    device: torch.device,
    *,
    seconds: float | None = None,
) -> Latency:
    """Time both modules alternately in the same (eager) mode; decoding is timed over a few steps
    past the whole prompt and counted `new_tokens` times. Of several workloads `calls` has each as
    a whole as well, and the seconds are their sum."""
    if isinstance(workload, Several):
        found = {
            name: measure_latency(original, rewritten, part, example, device, seconds=seconds)
            for name, part in workload.parts
        }
        return _together(found)
    pairs = zip(
        calls(original, workload, example), calls(rewritten, workload, example), strict=True
    )
    timings = {
        name: compare(first, second, device, seconds=seconds or SECONDS)
        for (name, first), (_, second) in pairs
    }
    if not isinstance(workload, Generate):
        timing = timings["forward"]
        return Latency(timing.first, timing.second, timing.ratio_upper, timings)
    prefill, decode = timings["prefill"], timings["decode"]
    steps = workload.new_tokens / DECODE_STEPS
    before = prefill.first + steps * decode.first
    after = prefill.second + steps * decode.second
    bound = (
        prefill.ratio_upper * prefill.first + decode.ratio_upper * steps * decode.first
    ) / before
    return Latency(before, after, bound, {"prefill": prefill, "decode": decode.per(DECODE_STEPS)})


def _together(found: Mapping[str, Latency]) -> Latency:
    before = sum(latency.before for latency in found.values())
    timings: dict[str, Timing] = {}
    for name, latency in found.items():
        timings[name] = Timing(latency.before, latency.after, latency.ratio_upper)
        timings |= {named(name, call): timing for call, timing in latency.calls.items()}
    return Latency(
        before,
        sum(latency.after for latency in found.values()),
        sum(latency.ratio_upper * latency.before for latency in found.values()) / before,
        timings,
    )


def calls(
    module: nn.Module, workload: Workload, example: Batch
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls that the workload consists of, by the name of their scenario, to be timed one
    after another; "decode" is `DECODE_STEPS` steps past the whole prompt."""
    if isinstance(workload, Several):
        for name, part in workload.parts:
            yield from ((named(name, call), run) for call, run in calls(module, part, example))
        return
    if not isinstance(workload, Generate):
        yield "forward", _call(module, repeat(example, workload))
        return
    prompt = prompt_of(example, workload)
    yield "prefill", lambda: prefilled(module, prompt)
    yield "decode", _decode(module, prompt_of(example, workload, max(1, workload.new_tokens // 2)))


def peak_temporaries(
    module: nn.Module, workload: Workload, example: Batch, device: torch.device
) -> int:
    """Peak bytes of one call of the workload beyond weights; generating: of the prefill, less
    the cache that it leaves; of several workloads: the largest."""
    if isinstance(workload, Several):
        return max(peak_temporaries(module, p, example, device) for _, p in workload.parts)
    if isinstance(workload, Generate):
        prompt = prompt_of(example, workload)
        caches: list[Any] = []
        peak = peak_live_bytes(
            lambda: caches.append(prefilled(module, prompt).past_key_values), device
        )
        return peak - held_bytes(caches)
    return peak_live_bytes(_call(module, repeat(example, workload)), device)


def prompt_of(example: Batch, workload: Generate, decoded: int = 1) -> Batch:
    """The arguments of a prefill: the example's tokens [batch, prompt], repeated as needed, of
    which only the last logits are computed. With an encoder they are what it reads, and `decoded`
    tokens are the decoder's."""
    if DECODER_IDS not in example:
        ids = next(v for v in example.values() if isinstance(v, Tensor))
        return {"input_ids": _tiled(ids, workload.batch, workload.prompt), "logits_to_keep": 1}
    source = {n: v for n, v in example.items() if not n.startswith("decoder_") and n != "labels"}
    return {
        DECODER_IDS: _tiled(example[DECODER_IDS], workload.batch, decoded),
        **{
            name: _tiled(v, workload.batch, workload.prompt if v.dim() == 2 else v.shape[1])
            for name, v in source.items()
            if isinstance(v, Tensor)
        },
    }


def _tiled(values: Tensor, rows: int, columns: int) -> Tensor:
    times = (-(-rows // values.shape[0]), -(-columns // values.shape[1]))
    tiled = values.repeat(*times, *[1] * (values.dim() - 2))
    return tiled[:rows, :columns].contiguous()


def repeat(example: Batch, workload: Workload) -> Batch:
    """The example with the workload's batch size, by repeating its rows."""
    size = getattr(workload, "batch", None)
    tensors = [v for v in example.values() if isinstance(v, Tensor) and v.ndim > 0]
    if not size or not tensors or any(t.shape[0] != tensors[0].shape[0] for t in tensors):
        return example
    times = -(-size // max(tensors[0].shape[0], 1))
    return {
        name: v.repeat(times, *[1] * (v.ndim - 1))[:size]
        if isinstance(v, Tensor) and v.ndim > 0
        else v
        for name, v in example.items()
    }


@torch.no_grad()
def prefilled(module: nn.Module, prompt: Batch) -> Any:
    """The output of a prefill that keeps its cache."""
    return module(**prompt, use_cache=True)


def _decode(module: nn.Module, prompt: Batch) -> Callable[[], Any]:
    output = prefilled(module, prompt)
    cache = output.past_key_values
    # layers that slide have let go of what a crop of several steps would bring back
    slides = any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ()))
    if slides:
        cache.activate_past_recording()
    name = DECODER_IDS if DECODER_IDS in prompt else "input_ids"
    step = {**prompt, name: prompt[name][:, -1:]}
    if name == DECODER_IDS:
        step = {n: v for n, v in step.items() if n in (name, "attention_mask")}
        step["encoder_outputs"] = (output.encoder_last_hidden_state,)

    @torch.no_grad()
    def steps() -> None:
        for _ in range(DECODE_STEPS):
            module(**step, past_key_values=cache, use_cache=True)
            if slides:
                cache.crop(-1)
        # every round decodes at the same length
        if not slides:
            cache.crop(-DECODE_STEPS)

    return steps


def _call(module: nn.Module, inputs: Batch) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return module(**inputs)

    return call
