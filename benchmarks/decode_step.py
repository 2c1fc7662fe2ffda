"""A whole decoding step through an exact and through a packed cache, each one CUDA graph.

    python benchmarks/decode_step.py [--layers 8] [--batch 16] [--length 32768]

A Llama of the 3.1-8B shape with random bf16 weights (which prove speed, never quality), with
fewer layers where the exact cache would not fit. Prints milliseconds of a step, tokens a second
and bytes of the cache, and how far the logits are from those through the exact cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.compiler import Compiler
from fxopt.request import resolve

LAYOUTS = ("k8v8g128r64s4", "k4v4g128r64s4", "k2v2g128r64s4")
ROOM, STEPS = 64, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--width", type=int, default=4096, help="of the hidden state")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = llama(args.layers, args.width, args.length, device)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length), device=device)
    workload = fxopt.Generate(batch=args.batch, prompt=args.length - ROOM, new_tokens=ROOM)
    compiler = Compiler(
        resolve(
            model, fxopt.Budget(weights="100%"), {"input_ids": ids[:1, :64]}, workload=workload,
            calibration=None, keep=(), rewrites=["kv_cache.blocks"], at=None, seed=0,
            time_limit=None,
        )
    )  # fmt: skip
    exact: Tensor | None = None
    for layout in (None, *args.layouts):
        logits, line = measured(stored(compiler, layout), ids)
        exact = logits if exact is None else exact
        apart = (logits - exact).abs().max().item() / exact.abs().max().item()
        print(json.dumps({"layout": layout or "exact", **line, "logits_apart": apart}), flush=True)


def llama(layers: int, width: int, length: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=width, intermediate_size=width * 7 // 2, head_dim=128,
        num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512), max_position_embeddings=length + ROOM,
        rope_theta=500_000.0, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def stored(compiler: Compiler, layout: str | None) -> Any:
    """The module whose caches all have one layout, without pricing anything."""
    every = [p for found in compiler.proposals.by_site.values() for p in found]
    chosen = [p for p in every if p.candidate.label == layout]
    if layout and not chosen:
        raise SystemExit(
            f"no layout {layout}; there are {sorted({p.candidate.label for p in every})}"
        )
    return compiler.emit(compiler.realise(chosen, lambda _: {}))


@torch.no_grad()
def measured(module: Any, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    batch, length = ids.shape
    cache = module.make_cache(batch, length + ROOM)
    began = time.perf_counter()
    module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    _wait(ids.device)
    prefill = time.perf_counter() - began

    def step() -> Tensor:
        output = module(
            input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return output.logits

    logits = step().float().clone()
    seconds = timed(step, ids.device)
    held = cache.nbytes
    line = {
        "layers": len(cache.layers), "batch": batch, "length": length,
        "prefill_s": round(prefill, 2), "step_ms": round(seconds * 1e3, 3),
        "tokens_s": round(batch / seconds, 1), "cache_gib": round(held / 2**30, 4),
    }  # fmt: skip
    return logits, line


def timed(step: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one step: of a replayed CUDA graph, or of a plain call on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    events[0].record()
    for _ in range(STEPS):
        graph.replay()
    events[1].record()
    _wait(device)
    return events[0].elapsed_time(events[1]) / STEPS / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
