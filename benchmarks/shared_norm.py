"""The smallest peaks that plans reach under autocast, with and without `activation.shared_norm`.

    python benchmarks/shared_norm.py [--model llama] [--errors 0.005 0.02] [--seconds 15]

One JSON line for each set of rewrites and error that plans may be expected to make: `peak` beyond
parameters and gradients as counted, `eager` as measured, `norms` the tensors that are made again of
a norm's output. Nothing is timed, ops count by their bytes and operations; a search ends after
`--seconds`. Random weights: bytes, never quality.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import fxopt
from fxopt import passes
from fxopt.ir.cost import Cost, OpCall
from fxopt.training import measure
from fxopt.training.capture import joint
from fxopt.training.emit import executable, partition
from fxopt.training.schedule import schedule
from fxopt.training.search import frontier
from fxopt.training.sites import saved_tensors
from fxopt.training.step import Step

ROUNDED, AGAIN, SHARED = (
    f"activation.{n}" for n in ("quantized_saved", "recompute", "shared_norm")
)
SETS = ([ROUNDED], [ROUNDED, SHARED], [ROUNDED, AGAIN], [ROUNDED, AGAIN, SHARED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["llama", "vit"], default="llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--errors", type=float, nargs="*", default=[0.005])
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, batch = example(args)
    gradients = sum(p.nbytes for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        eager = measure.peak(model, batch) - gradients
        step = taken_apart(model, batch)
        for names in SETS:
            for error in args.errors:
                plan = smallest(step, model, names, error, args.seconds)
                made = sum(form.image.shares for form in plan.images.values())
                line = {"rewrites": names, "error": error, "eager": eager}
                line |= {"peak": plan.peak - gradients, "norms": made, "expected": plan.error}
                print(json.dumps(line), flush=True)


def example(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    heads = max(1, args.hidden // 64)
    if args.model == "vit":
        images = ViTConfig(
            hidden_size=args.hidden, intermediate_size=4 * args.hidden, image_size=128,
            num_hidden_layers=args.layers, num_attention_heads=heads, patch_size=16,
        )  # fmt: skip
        pixels = torch.randn(8, 3, 128, 128)
        batch = {"pixel_values": pixels, "labels": torch.zeros(8, dtype=torch.int64)}
        return ViTForImageClassification(images).train(), batch
    text = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, vocab_size=64,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(64, (2, 256))
    return LlamaForCausalLM(text).train(), {"input_ids": ids, "labels": ids}


def taken_apart(model: nn.Module, batch: dict[str, Any]) -> Step:
    """The step of a model, its graph as it was traced."""
    found: list[Step] = []

    def cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        found.append(Step.of(graph.graph, count))
        return partition(fx.GraphModule(graph, graph.graph), schedule(found[0], ()), count)

    with joint(model, batch) as traced:
        traced.build(cut, executable)
    return found[0]


def smallest(step: Step, model: nn.Module, names: list[str], error: float, seconds: float) -> Any:
    """The plan with the lowest peak of those that may be expected to err no more."""
    with _disable_current_modes(), no_python_dispatcher():
        saved = saved_tensors(
            step, priced, passes.load(names), fxopt.Train(1, 1), (),
            weights=dict(model.named_parameters()),
        )  # fmt: skip
    deadline = time.monotonic() + seconds
    limits: dict[str, float] = {"error": error, "deadline": deadline}
    return frontier(step, saved.seconds, saved.droppable, saved.forms, **limits)[-1]


def priced(call: OpCall) -> Cost:
    return Cost(1e-6 + 1e-9 * (call.bytes_read + call.bytes_written) + 1e-10 * call.flops)


if __name__ == "__main__":
    main()
