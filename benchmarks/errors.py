"""Predicted against measured errors of whole plans, and how often a search has to correct itself.

    python benchmarks/errors.py [--plans 20] [--sequences 9] [--rewrites kv_cache linear]

Plans of the trained examples/tiny_lm are predicted before any of them is realised, twice: as the
sum of what single sites measured, and as the sum of what each layer's sites measured together,
which is all that pairs within a layer could add. Then each is measured as a whole, on the sequences
that sites were measured on and on all that a search chooses by. Then ten budgets are searched from
these scores, and the choices tried until one held are counted.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

import fxopt
from fxopt.compiler import ALONE, Compiler
from fxopt.decide.search import Choice, Limits, Search, measure_swaps
from fxopt.decide.solve import solve
from fxopt.decide.table import Column, Table
from fxopt.measure import Measurer
from fxopt.request import resolve
from fxopt.session import Session

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARES = (60, 40, 30, 25, 21, 18)
"""Percent of the bytes of weights and cache."""
REWRITES = ["kv_cache", "linear.quantized", "linear.low_rank"]
LIMITS = np.geomspace(1e-4, 0.1, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=9)
    parser.add_argument(
        "--rewrites", nargs="*", default=["kv_cache", "linear.quantized", "linear.low_rank"]
    )
    args = parser.parse_args()
    compiler = Compiler(request(args))
    table = compiler.table()
    plans = chosen(compiler, table, args.plans)
    search = Search(table, Limits({}, {}, {"error": 1.0}))
    sites = [search.predict(choice)["error"] for choice in plans]
    layers = [sum(map(alone(compiler), by_layer(search.columns(choice)))) for choice in plans]
    whole = [alone(compiler)(search.columns(choice)) for choice in plans]
    chosen_by = [everywhere(compiler, search.columns(choice)) for choice in plans]
    print(f"{'sites':>10}{'layers':>10}{'whole':>10}{'on all':>10}")
    for row in sorted(zip(sites, layers, whole, chosen_by, strict=True)):
        print("".join(f"{value:>10.2e}" for value in row))
    compared(sites, whole, "sum of sites, same sequences")
    compared(layers, whole, "sum of layers, same sequences")
    compared(sites, chosen_by, "sum of sites, all sequences")
    compared(layers, chosen_by, "sum of layers, all sequences")
    rounds = [searched(compiler, table, limit) for limit in LIMITS]
    few = sum(0 < count <= 3 for count in rounds)
    print(f"choices tried until one held (0: none did): {rounds}; at most 3 in {few} of 10")


def compared(predicted: Sequence[float], measured: Sequence[float], what: str) -> None:
    ratios = np.array(measured) / np.array(predicted)
    rank = spearmanr(predicted, measured).statistic
    print(f"{what}: Spearman {rank:.3f}, measured / predicted {np.median(ratios):.2f} "
          f"({ratios.min():.2f} to {ratios.max():.2f})")  # fmt: skip


def request(args: argparse.Namespace) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    from tiny_lm_data import MODEL_DIR, heldout_windows

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    windows = heldout_windows(512)[: args.sequences]
    return resolve(
        model,
        fxopt.Budget(kl=1e9, minimize="latency"),
        {"input_ids": windows[:1]},
        workload=fxopt.Generate(batch=1, prompt=384, new_tokens=128),
        calibration=[{"input_ids": row[None]} for row in windows],
        keep=(), rewrites=args.rewrites, at=None, seed=0, time_limit=None,
    )  # fmt: skip


def chosen(compiler: Compiler, table: Table, count: int) -> list[Choice]:
    """Plans of least error at shares of the bytes, their sites measured, and random mixtures."""
    rng, found = random.Random(0), list[Choice]()
    kept = sum(c[0].cost.weight_bytes + c[0].cost.state_bytes for c in table.columns)
    for share in SHARES:
        limits = Limits({"memory": kept * share / 100}, {}, {"error": 1.0})
        search = Search(table, limits)
        measure_swaps(search, compiler.measure_column, deadline=1e18)
        best = solve(search.problem())
        found += [] if best is None else [best.choice]
    compiler.scores.save()
    while len(found) < count and found[: len(SHARES)]:
        one, other = rng.choice(found), rng.choice(found)
        share = rng.random()
        mixed = tuple(a if rng.random() < share else b for a, b in zip(one, other, strict=True))
        kept_again = rng.choice((0.0, 0.3, 0.6))
        mixed = tuple(0 if rng.random() < kept_again else o for o in mixed)
        if any(mixed) and mixed not in found:
            found.append(mixed)
    return found


def by_layer(columns: Iterable[Column]) -> list[list[Column]]:
    """The columns that change anything, apart by the layer that their sites are in."""
    found: dict[str, list[Column]] = {}
    for column in columns:
        if column.proposals:
            layer = re.match(r".*?\d+", column.proposals[0].site.key)
            found.setdefault(layer[0] if layer else "", []).append(column)
    return list(found.values())


def alone(compiler: Compiler) -> Callable[[Sequence[Column]], float]:
    """The error of some columns together, on the sequences that single sites are measured on."""

    def measure(columns: Sequence[Column]) -> float:
        graph = compiler.realise([p for column in columns for p in column.proposals]).graph
        return compiler.choose_reference.measure(graph, batches=ALONE).mean

    return measure


def everywhere(compiler: Compiler, columns: Sequence[Column]) -> float:
    editor = compiler.realise([p for column in columns for p in column.proposals])
    return Measurer(compiler).error(editor)


def searched(compiler: Compiler, table: Table, limit: float) -> int:
    """How many choices a search under a KL limit tried until the first that held; 0: none did."""
    budget = fxopt.Budget(kl=float(limit), minimize="memory")
    session = Session(compiler.under(budget), table)
    session.search_best()
    trials = session.search.trials
    tried = ", ".join(f"{t.predicted['error']:.2e} -> {t.measured['error']:.2e}" for t in trials)
    print(f"kl {limit:.1e}: {tried}")
    return next((i for i, trial in enumerate(trials, 1) if trial.excess <= 0), 0)


if __name__ == "__main__":
    main()
