"""Predicted against measured: latency and peak memory of random plans, whole models.

    python benchmarks/prediction.py [--device cuda] [--plans 20] [--out predictions.json]

Everything is predicted, and written to --out, before any plan of that model is realised. What a
plan takes is measured interleaved with the original and given relative to it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide.runs import measure_latency
from fxopt.decide.search import Choice, Search
from fxopt.decide.table import Table
from fxopt.measure import Measurer
from fxopt.request import resolve

SHAPES = {
    "cpu": {
        "llama-4x256": (256, 4, 4, 2, 704),
        "llama-4x512": (512, 4, 8, 2, 1408),
        "llama-2x1024": (1024, 2, 16, 8, 2816),
    },
    "cuda": {
        "llama-0.5B": (896, 24, 14, 2, 4864),
        "llama-3B": (3072, 28, 24, 8, 8192),
        "llama-8B": (4096, 32, 32, 8, 14336),
    },
}
"""hidden, layers, query heads, KV heads, MLP width."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("predictions.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name, shape in SHAPES[args.device].items():
        if args.only in name:
            results[name] = compare(name, shape, args, results)
    print(f"{'model':<14}{'row':<18}{'median':>8}{'worst':>8}")
    for name, plans in results.items():
        for row in plans[0]["predicted"]:
            off = [abs(p["predicted"][row] / p["measured"][row] - 1) for p in plans]
            print(f"{name:<14}{row:<18}{statistics.median(off):>8.1%}{max(off):>8.1%}")


def compare(
    name: str, shape: tuple[int, ...], args: argparse.Namespace, earlier: dict[str, Any]
) -> list[dict[str, Any]]:
    """Predict all plans, write them, then realise and measure each."""
    model = llama(shape).to(args.device)
    compiler = Compiler(request(model, args))
    measurer = Measurer(compiler)
    table = compiler.table()
    search = Search(table, compiler.limits(measurer.baseline, table))
    plans = [
        {"choice": choice, "predicted": predicted(search, measurer, choice)}
        for choice in random_choices(table, args.plans)
    ]
    args.out.write_text(json.dumps({**earlier, name: plans}, indent=1))
    for plan in plans:
        plan["measured"] = measured(compiler, measurer, search, plan["choice"])
        print(name, json.dumps({k: plan[k] for k in ("predicted", "measured")}), flush=True)
    args.out.write_text(json.dumps({**earlier, name: plans}, indent=1))
    return plans


def llama(shape: tuple[int, ...]) -> torch.nn.Module:
    hidden, layers, heads, kv_heads, width = shape
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=width, vocab_size=4096,
        max_position_embeddings=65536,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def request(model: torch.nn.Module, args: argparse.Namespace) -> Any:
    ids = torch.randint(0, 4096, (1, args.prompt), device=args.device)
    return resolve(
        model,
        fxopt.Budget(latency={"prefill": "1x", "decode": "1x"}, activations="100%"),
        {"input_ids": ids},
        workload=fxopt.Generate(batch=1, prompt=args.prompt, new_tokens=64),
        calibration=None, keep=(), rewrites=None, at=None, seed=0, time_limit=None,
    )  # fmt: skip


def random_choices(table: Table, count: int) -> list[Choice]:
    """Plans of which each rewrites another share of the sites, each layer for itself."""
    rng = random.Random(0)
    choices: list[Choice] = []
    for i in range(count):
        share = (i + 1) / count
        choice = [
            rng.randrange(len(columns)) if rng.random() < share else 0 for columns in table.columns
        ]
        for groups in table.exclusive:
            # of the decisions that touch one layer, at most one rewrites it
            taken = [g for g in groups if choice[g]]
            for g in taken[1:]:
                choice[g] = 0
        choices.append(tuple(choice))
    return choices


def predicted(search: Search, measurer: Measurer, choice: Choice) -> dict[str, float]:
    """Rows relative to what the original measured."""
    rows = search.predict(choice)
    names = ("latency.prefill", "latency.decode", "activations")
    return {name: rows[name] / measurer.baseline[name] for name in names}


def measured(
    compiler: Compiler, measurer: Measurer, search: Search, choice: Choice
) -> dict[str, float]:
    """The same rows of the realised module."""
    module = compiler.emit(compiler.realise(compiler.chosen(search, choice)))
    work = compiler.request
    latency = measure_latency(work.model, module, work.workload, work.example, compiler.device)
    rows = {f"latency.{name}": t.second / t.first for name, t in latency.calls.items()}
    peak = measurer.temporaries(module)
    return {**rows, "activations": peak / measurer.baseline["activations"]}


if __name__ == "__main__":
    main()
