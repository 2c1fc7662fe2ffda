"""Peak and seconds of a training step under budgets: fxopt beside eager and PyTorch's own knob.

    python benchmarks/training.py [--model llama] [--layers 4] [--batch 2] [--seq 256]
    python benchmarks/training.py --error 0.02 --lowest 0.2 --no-stock
    python benchmarks/training.py --rewrites activation.offload activation.recompute

One JSON line a run. `predicted` is fxopt's count, `peak` what was alive as measured (storages on a
CPU, the allocator's statistic on CUDA) beyond parameters and buffers, `equal` whether loss,
gradients and random state are eager's bit for bit, and `gradients` by how much all gradients are
off together; `by` counts tensors by what happens to them. `stock` is
`torch.compile(backend="aot_eager")` under `torch._functorch.config.activation_memory_budget`, the
strongest knob that needs no change to a model; its peak is measured on CUDA only, since counting
storages turns compilation off.
Random weights: speed and bytes, never quality.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch

import fxopt
from fxopt.training import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["llama", "gpt2"], default="gpt2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budgets", type=int, default=6)
    parser.add_argument("--lowest", type=float, default=0.4)
    parser.add_argument("--shares", nargs="*", type=float, help="budgets, instead of evenly many")
    parser.add_argument("--mlp", type=int, help="width of a llama's MLP")
    parser.add_argument("--kv-heads", type=int, help="of a llama")
    parser.add_argument("--error", type=float, help="the relative_error row")
    parser.add_argument("--rewrites", nargs="*", help="names, as for fxopt.optimize")
    parser.add_argument("--no-stock", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = build(args).to(args.device, getattr(torch, args.dtype)).train()
    ids = torch.randint(args.vocabulary, (args.batch, args.seq), device=args.device)
    inputs = {"input_ids": ids, "labels": ids}
    eager = measure.outcome(model, inputs)
    report("eager", model, model, inputs, eager)
    shares = args.shares or torch.linspace(1.0, args.lowest, args.budgets).tolist()
    for share in shares:
        try:
            opt: Any = fxopt.optimize(
                model,
                fxopt.Budget(activations=f"{share:.0%}", relative_error=args.error),
                inputs,
                workload=fxopt.Train(args.batch, args.seq),
                rewrites=args.rewrites,
            )
        except fxopt.BudgetError as error:
            opt = error.best
        rows = {row.name: row for row in opt.plan.totals}
        predicted = round(rows["memory"].predicted - rows["memory"].measured) + measure.peak(
            opt, inputs
        )
        report(
            "fxopt", model, opt, inputs, eager,
            budget=round(share, 2), predicted=predicted, held=opt.report.kept,
            by=Counter(f"{d.rewrite} {d.label}".strip() for d in opt.plan.decisions),
        )  # fmt: skip
    for share in [] if args.no_stock else shares:
        torch.compiler.reset()
        with functorch.patch(activation_memory_budget=share):
            stock: Any = torch.compile(model, backend="aot_eager")
            measure.outcome(stock, inputs)
            report("stock", model, stock, inputs, eager, budget=round(share, 2))


def build(args: argparse.Namespace) -> nn.Module:
    """A small causal language model; GPT-2 has dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    heads = max(1, args.hidden // 64)
    if args.model == "gpt2":
        config = GPT2Config(
            n_embd=args.hidden, n_layer=args.layers, n_head=heads, vocab_size=args.vocabulary,
            n_positions=args.seq, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    llama = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.mlp or args.hidden * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=heads,
        num_key_value_heads=args.kv_heads or heads, use_cache=False,
        vocab_size=args.vocabulary, max_position_embeddings=args.seq,
    )  # fmt: skip
    return LlamaForCausalLM(llama)


def report(
    name: str,
    model: nn.Module,
    module: nn.Module,
    inputs: dict[str, Any],
    eager: measure.Outcome,
    **facts: Any,
) -> None:
    outcome = measure.outcome(module, inputs)
    found = {n.replace("_orig_mod.", ""): t for n, t in outcome.tensors.items()}
    mine = measure.Outcome(found)
    # logits that a plan does without
    worst, off = eager.without(eager.outputs - mine.outputs).difference(mine)
    timing = measure.seconds(model, module, inputs)
    counted = name != "stock" or measure.device_of(model).type == "cuda"
    line = {
        "run": name,
        "peak": measure.peak(module, inputs) if counted else None,
        "ratio": round(timing.second / timing.first, 3),
        "equal": off == 0.0,
        "worst": worst,
        "off": float(f"{off:.2g}"),
        "gradients": float(f"{eager.gradient_error(measure.Outcome(found)):.2g}"),
    }
    print(json.dumps({**line, **facts}), flush=True)


if __name__ == "__main__":
    main()
