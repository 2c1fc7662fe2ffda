"""`opt.generate` through an exact and through packed caches, and Hugging Face's static cache.

    python benchmarks/decode_step.py [--layers 32] [--batch 16] [--length 32768] [--peer]

A Llama of the 3.1-8B shape with random bf16 weights, and caches that are filled with random
numbers (both prove speed, never quality). Prints milliseconds of a decoded token with CUDA graphs
(fxopt's default; `step_ms` is the graph alone) and with --eager without, what `generate` takes for
72 tokens in all, and bytes of the cache.
--peer adds the original through Hugging Face's `StaticCache`, which `generate` compiles, at this
batch and length; --kernels says where the time of a step goes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import torch
from kv_decode import fill
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxopt
from fxopt.compiler import Compiler
from fxopt.kernels.kv_attention.layout import parse, split_state
from fxopt.request import resolve

LAYOUTS = ("k8v8g128r64s4", "k4v4g128r64s4", "k2v2g128r64s4")
ROOM, FEW, MANY = 512, 8, 72


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--width", type=int, default=4096, help="of the hidden state")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--eager", action="store_true", help="also without CUDA graphs")
    parser.add_argument("--peer", action="store_true", help="also Hugging Face's static cache")
    parser.add_argument("--kernels", action="store_true", help="also the kernels of a step")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = llama(args.layers, args.width, args.length, device)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length), device=device)
    if args.peer:
        report("static", model, static_cache(model, args.batch, args.length), ids)
        # What was compiled holds on to the cache and to memory of its graphs.
        torch.compiler.reset()
        release(device)
    workload = fxopt.Generate(batch=args.batch, prompt=args.length, new_tokens=ROOM)
    compiler = Compiler(
        resolve(
            model, fxopt.Budget(weights="100%"), {"input_ids": ids[:1, :64]}, workload=workload,
            calibration=None, keep=(), rewrites=["kv_cache.blocks"], at=None, seed=0,
            time_limit=None,
        )
    )  # fmt: skip
    for layout in (None, *args.layouts):
        module = stored(compiler, layout)
        for graphs in (True, False) if args.eager else (True,):
            module.cuda_graphs = graphs
            name = f"{layout or 'exact'}{'' if graphs else ', eager'}"
            report(name, module, packed_cache(module, args.batch, args.length), ids, args.kernels)


def report(name: str, module: Any, cache: Any, ids: Tensor, kernels: bool = False) -> None:
    """Times `generate` from a filled cache; the difference of two lengths is free of its start."""
    generated(module, cache, ids, FEW)
    few, many = (generated(module, cache, ids, count) for count in (FEW, MANY))
    seconds = (many - few) / (MANY - FEW)
    states = getattr(cache, "states", None) or [[x.keys, x.values] for x in cache.layers]
    line = {
        "cache": name, "step_ms": replayed(module, ids.device),
        "layers": len(cache.layers), "batch": len(ids), "length": ids.shape[1],
        "token_ms": round(seconds * 1e3, 3), "tokens_s": round(len(ids) / seconds, 1),
        "all_s": round(many, 3),
        "cache_gib": round(sum(t.nbytes for state in states for t in state) / 2**30, 3),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    if kernels and line["step_ms"] is not None:
        print_kernels(module)
    del states, cache
    release(ids.device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def replayed(module: Any, device: torch.device) -> float | None:
    """Milliseconds of the captured step alone; None where there is none."""
    graph = captured(module)
    if graph is None:
        return None
    _wait(device)
    began = time.perf_counter()
    for _ in range(FEW):
        graph.replay()
    _wait(device)
    return round((time.perf_counter() - began) / FEW * 1e3, 3)


def captured(module: Any) -> torch.cuda.CUDAGraph | None:
    known = getattr(module, "_steps", None)
    kinds = [step for _, found in known.known.values() for step in found.values()] if known else []
    return next((step.graph for step in kinds if step.graph is not None), None)


def print_kernels(module: Any) -> None:
    """Launches of each kernel and their microseconds in one step, the longest first."""
    graph = captured(module)
    assert graph is not None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(FEW):
            graph.replay()
        torch.cuda.synchronize()
    for row in sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:16]:
        micros, launches = row.self_device_time_total / FEW, row.count / FEW
        print(f"  {micros:9.1f} us {launches:6.0f} x {micros / launches:8.2f}  {row.key[:72]}")


def generated(module: Any, cache: Any, ids: Tensor, count: int) -> float:
    """Seconds of `generate` for `count` tokens behind those in `cache`."""
    held = int(cache.get_seq_length())
    tokens = torch.cat([ids, ids[:, : held + 1 - ids.shape[1]]], 1)
    _wait(ids.device)
    began = time.perf_counter()
    module.generate(
        tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, do_sample=False,
        max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    _wait(ids.device)
    return time.perf_counter() - began


def packed_cache(module: Any, batch: int, length: int) -> Any:
    cache = module.make_cache(batch, length + ROOM)
    for layer in cache.layers:
        for _, fmt, part in split_state(parse(layer.layout), layer.num_kv_heads, layer.state):
            fill(part, fmt, length)
    cache.length.set(length)
    return cache


def static_cache(model: Any, batch: int, length: int) -> Any:
    config = model.config
    cache: Any = StaticCache(config, max_cache_len=length + ROOM)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
    return cache


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
