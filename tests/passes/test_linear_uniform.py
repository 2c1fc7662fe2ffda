"""benchmarks/linear_uniform.py: solved against uniform plans, with little text."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("linear_uniform", "linear_quality", "curves_plot", "training_plot")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER))
    for known in MODULES:
        monkeypatch.delitem(sys.modules, known, raising=False)
    return importlib.import_module("linear_uniform")


@pytest.mark.slow
def test_the_solved_plan_stands_beside_the_best_uniform_one(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawing = tmp_path / "curves.svg"
    arguments = "--windows 6 --length 256 --low-rank 75 --all --svg"
    monkeypatch.setattr(sys, "argv", ["linear_uniform.py", *arguments.split(), str(drawing)])
    bench.main()
    *plans, heads, _, row = capsys.readouterr().out.splitlines()
    # the solver's plan by sites alone, and one that was chosen about it, if any
    uniform, *_, solved = (plan for plan in map(json.loads, plans) if "solved" in plan)
    assert (uniform["solved"], solved["solved"]) == (False, True)
    # ranks are multiples of 8: both come near to what they may take
    assert all(0.72 < plan["share"] <= 0.75 for plan in (uniform, solved))
    assert solved["kl"] < 0.8 * uniform["kl"]
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (heads, row))
    shown = dict(zip(*cells, strict=True))
    assert shown["best uniform plan"] == uniform["name"]
    assert float(shown["ratio"]) == pytest.approx(solved["loss"] / uniform["loss"], abs=0.01)
    assert float(shown["KL, ratio"]) == pytest.approx(solved["kl"] / uniform["kl"], abs=0.01)
    page = ElementTree.parse(drawing)
    titles = [t.text for t in page.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2
    assert f"{solved['share']:.1%} of the bytes, {solved['loss']:.2g} nats" in str(titles[1])


def test_uniform_plans_have_one_setting_for_all_layers(bench: ModuleType) -> None:
    """A layer that lacks it, as the 576 features of `down_proj` lack groups of 128, has the one
    of nearest bytes; of ranks the largest fraction that fits is taken."""
    rewrites = ["linear.quantized", "linear.low_rank", "linear.low_rank_quantized"]
    made = bench.Bench(rewrites, argparse.Namespace(windows=3, length=32, device="cpu"))
    plans = {name: labels(plan) for name, plan in made.uniform(0.3).items()}
    assert plans["quantized int4-g64"] == {"int4-g64": 42}
    assert plans["quantized int4-g128"] == {"int4-g128": 36, "int4-g64": 6}
    assert "quantized int8-g128" not in plans
    sizes = {
        name.rpartition(" ")[0]: float(name.rpartition(" ")[2]) for name in plans if "low" in name
    }
    assert set(sizes) == {"low_rank", "low_rank_quantized int8", "low_rank_quantized int4"}
    (rewrite,) = (r for r in made.made.rewrites if r.name == "linear.low_rank")
    larger = replace(rewrite, fractions=(sizes["low_rank"] + 0.005,))
    ((_, plan),) = made.plans(larger, True).items()
    assert bench.share(made.made, made.uniform(0.3)[f"low_rank {sizes['low_rank']:g}"]) <= 0.3
    assert bench.share(made.made, plan) > 0.3


def test_a_rewrite_that_serves_no_layer_has_a_row_that_says_so(bench: ModuleType) -> None:
    quality, names = importlib.import_module("linear_quality"), ["linear.quantized_experts"]
    made = quality.compiler(names, 3, length=32)
    assert quality.row(made, names, 0.5, 0).startswith(f"| `{names[0]}` | serves no layer here |")


def labels(plan: Any) -> Counter[str]:
    return Counter(proposal.candidate.label for proposal in plan)
