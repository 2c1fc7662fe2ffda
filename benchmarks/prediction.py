"""Predicted against measured: seconds and peak memory of random plans of whole models.

    python benchmarks/prediction.py [--device cuda] [--plans 20] [--only 3B] [--out FILE]
    python benchmarks/prediction.py --draw predictions-cpu.json docs/images/prediction-cpu.svg

Three shapes of Llama share the plans. What is predicted of a model's plans is written to --out
before any plan of it is realised, and calibrated by other models alone: by two plans of a shape
that is not among the three, and by those of the three that came before. Weights are random, and
rounded to nearest where a plan stores them in fewer bits: they prove speed and bytes.

A plan's peak is that of a prompt, the cache included, and of a few steps after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from scatter import draw
from torch import Tensor

import fxopt
from fxopt.compiler import Compiler
from fxopt.cost_models.timing import time_call
from fxopt.decide.options import lowered
from fxopt.decide.propose import Proposal
from fxopt.decide.runs import DECODE_STEPS, calls
from fxopt.decide.search import Choice
from fxopt.decide.table import Table, build
from fxopt.decide.verify import peak_live_bytes, weight_bytes
from fxopt.kernels import fp8_linear, quantized_linear
from fxopt.pace import Pace
from fxopt.passes.baseline import baseline_calls
from fxopt.request import resolve

REWRITES = ["linear.quantized", "kv_cache.blocks", "attention.window"]
LABELS = {
    "int8-g128", "int4-g128", "fp8", "w1024+s16",
    "k8v8g128r64s4", "k4v4g128r64s4", "k2v2g128r64s4",
}  # fmt: skip
"""Of a rewrite's candidates: each layout, with and without a window, is kernels to compile."""
ROWS = {"prefill": "s", "decode": "s", "memory": "bytes"}


@dataclass(frozen=True)
class Shape:
    """A Llama: its hidden size, layers, query heads, KV heads and MLP width."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int

    def model(self, device: str) -> Any:
        config = transformers.LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.width,
            vocab_size=32_000 if device == "cuda" else 4096, max_position_embeddings=65_536,
        )  # fmt: skip
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


SHAPES = {
    "cpu": (
        Shape("calibration", 384, 3, 6, 2, 1024),
        Shape("llama-4x256", 256, 4, 4, 2, 704),
        Shape("llama-4x512", 512, 4, 8, 2, 1408),
        Shape("llama-2x1024", 1024, 2, 16, 8, 2816),
    ),
    "cuda": (
        Shape("calibration", 2048, 12, 16, 8, 6144),
        Shape("llama-0.5B", 896, 24, 14, 2, 4864),
        Shape("llama-3B", 3072, 28, 24, 8, 8192),
        Shape("llama-8B", 4096, 32, 32, 8, 14336),
    ),
}
PROMPT = {"cpu": 480, "cuda": 8160}
"""Tokens after which no block of a packed cache is due within the few steps that are timed."""
MEASURED = 0.5
"""Seconds for timing one kind of call of a plan."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plans", type=int, default=20, help="of the three shapes together")
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--only", default="", help="shapes whose name has this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("JSON", "SVG"))
    args = parser.parse_args()
    if args.draw:
        found = json.loads(args.draw[0].read_text())
        args.draw[1].write_text(draw(found["models"], found["device"], ROWS))
        return
    args.prompt = args.prompt or PROMPT[args.device]
    args.out = args.out or Path(f"predictions-{args.device}.json")
    first, *others = SHAPES[args.device]
    shapes = [shape for shape in others if args.only in shape.name]
    results: dict[str, Any] = {}
    for number, shape in enumerate((first, *shapes)):
        share = args.plans // len(shapes) + (number <= args.plans % len(shapes))
        began = time.perf_counter()
        plans = compare(shape, 2 if shape is first else share, args, results)
        print(f"{shape.name}: {time.perf_counter() - began:.0f} s for {len(plans)} plans")
    print(summary({name: plans for name, plans in results.items() if name != first.name}))


def compare(
    shape: Shape, count: int, args: argparse.Namespace, results: dict[str, Any]
) -> list[dict[str, Any]]:
    """Predict all plans, write them, then realise and measure each."""
    clock = Clock()
    compiler = compiler_of(shape.model(args.device), args)
    clock("captured")
    for proposals in compiler.proposals.by_site.values():
        proposals[:] = [p for p in proposals if p.candidate.label in LABELS]
    options = lowered(compiler.proposals, (*compiler.scenarios, compiler.final), baseline_calls)
    table = build(compiler.proposals, options, compiler.costs, lambda _: 0.0)
    compiler.costs.save()
    clock("priced")
    pace = Pace(compiler)
    plans: list[dict[str, Any]] = [
        {
            "options": dict(Counter(p.candidate.label for p in chosen(table, choice))),
            "choice": choice,
            "predicted": predicted(compiler, pace, table, choice),
        }
        for choice in random_choices(table, count)
    ]
    results[shape.name] = plans
    write(results, compiler, args)
    clock("predicted")
    for plan in plans:
        plan["measured"] = realised(compiler, table, plan["choice"])
        pace.note(table, plan["choice"], plan["measured"])
        compared = {k: [plan[when][k] for when in ("predicted", "measured")] for k in ROWS}
        print(shape.name, json.dumps(compared), flush=True)
        clock("realised")
    write(results, compiler, args)
    print(f"{shape.name}: {clock}")
    return plans


def write(results: dict[str, Any], compiler: Compiler, args: argparse.Namespace) -> None:
    facts = compiler.hardware
    document = {"device": facts.name, "threads": facts.threads, "torch": torch.__version__,
                "prompt": args.prompt, "models": results}  # fmt: skip
    args.out.write_text(json.dumps(document, indent=1))


def compiler_of(model: Any, args: argparse.Namespace) -> Compiler:
    ids = torch.randint(0, model.config.vocab_size, (1, args.prompt), device=args.device)
    return Compiler(
        resolve(
            model, fxopt.Budget(weights="100%"), {"input_ids": ids},
            workload=fxopt.Generate(batch=1, prompt=args.prompt, new_tokens=64),
            calibration=None, keep=(), rewrites=REWRITES, at=None, seed=0, time_limit=None,
        )
    )  # fmt: skip


def random_choices(table: Table, count: int) -> list[Choice]:
    """Plans of which each rewrites another share of the layers' parts. The heads of an attention
    are rewritten alike in most: it is what equal errors lead to."""
    rng = random.Random(0)
    choices: list[Choice] = []
    for i in range(count):
        share, alike = i / max(count - 1, 1), rng.random() < 0.7
        picked: dict[str, int] = {}
        choice: list[int] = []
        for sites, columns in zip(table.keys, table.columns, strict=True):
            option = rng.randrange(len(columns)) if rng.random() < share else 0
            op = sites[0].op if sites[0].family == "attention" and alike else sites[0].key
            choice.append(picked.setdefault(op, option))
        choices.append(tuple(choice))
    return choices


def predicted(compiler: Compiler, pace: Pace, table: Table, choice: Choice) -> dict[str, float]:
    """Rows of a plan that nothing was measured of."""
    return {**pace.seconds(table, choice), "memory": pace.memory(table, choice)}


def chosen(table: Table, choice: Choice) -> list[Proposal]:
    pairs = zip(table.columns, choice, strict=True)
    return [p for columns, option in pairs for p in columns[option].proposals]


def realised(compiler: Compiler, table: Table, choice: Choice) -> dict[str, float]:
    """The same rows of the realised module."""
    weights = dict(compiler.request.model.named_parameters(remove_duplicate=False))
    editor = compiler.realise(chosen(table, choice), lambda p: rounded(p, weights))
    module = compiler.emit(editor)
    work, device = compiler.request, compiler.device
    rows: dict[str, float] = {}
    for name, call in calls(module, work.workload, work.example):
        steps = DECODE_STEPS if name == "decode" else 1
        rows[name] = timed(call, device) / steps
        if name == "prefill":
            rows["memory"] = float(weight_bytes(module) + peak_live_bytes(call, device))
    del module, editor
    gc.collect()
    return rows


def timed(call: Any, device: torch.device) -> float:
    """As ops are timed: the lower quartile of repeats that fill `MEASURED` seconds."""
    for _ in range(2):  # kernels are compiled, steps recorded
        call()
    return time_call(call, device, seconds=MEASURED).seconds


def rounded(proposal: Proposal, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a proposal stores, rounded to nearest."""
    given = proposal.candidate.parameters
    if proposal.site.family != "linear":
        return {}
    weight = weights[proposal.site.info.weight].detach()  # pyright: ignore
    if given.get("format") == "fp8":
        scale = fp8_linear.row_scale(weight)
        return {"rounded": fp8_linear.quantize(weight, scale), "scale": scale[:, 0]}
    codes = quantized_linear.quantize(weight, int(given["bits"]), int(given["group_size"]))
    return dict(zip(("packed", "scale", "zero"), codes, strict=True))


def summary(results: dict[str, Any]) -> str:
    """Median and worst error of each row, of each model and of all plans."""
    lines = [f"{'model':<14}{'plans':>6}{'row':>9}{'median':>9}{'worst':>9}"]
    every = [plan for plans in results.values() for plan in plans]
    for name, plans in (*results.items(), ("all", every)):
        for row in ROWS:
            off = [abs(p["predicted"][row] / p["measured"][row] - 1) for p in plans]
            lines.append(
                f"{name:<14}{len(plans):>6}{row:>9}{statistics.median(off):>9.1%}{max(off):>9.1%}"
            )
    return "\n".join(lines)


class Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._spent: dict[str, float] = {}

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        self._spent[what] = self._spent.get(what, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self._spent.items())


if __name__ == "__main__":
    main()
