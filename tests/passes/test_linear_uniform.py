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
def test_the_solver_beats_every_uniform_plan_of_its_bytes(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawing = tmp_path / "curves.svg"
    arguments = "--windows 6 --length 256 --low-rank 75 40 --all --svg"
    monkeypatch.setattr(sys, "argv", ["linear_uniform.py", *arguments.split(), str(drawing)])
    bench.main()
    shown = capsys.readouterr().out.splitlines()
    plans = [json.loads(line) for line in shown if line[0] == "{"]
    assert [(plan["within"], plan["solved"]) for plan in plans] == [
        (0.75, False), (0.75, True), (0.4, False), (0.4, True),
    ]  # fmt: skip
    # ranks are multiples of 8: both come near to what they may take, and none above it
    assert all(plan["within"] - 0.05 < plan["share"] <= plan["within"] for plan in plans)
    heads, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in shown if line[0] == "|"
    )
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    for row, uniform, solved in zip(found, plans[::2], plans[1::2], strict=True):
        assert row["best uniform plan"] == uniform["name"]
        assert solved["loss"] < 0.9 * uniform["loss"]
        assert float(row["ratio"]) == pytest.approx(solved["loss"] / uniform["loss"], abs=0.01)
        assert float(row["KL, ratio"]) == pytest.approx(solved["kl"] / uniform["kl"], abs=0.01)
    page = ElementTree.parse(drawing)
    assert sum(c.get("r") == "4" for c in page.iter("{http://www.w3.org/2000/svg}circle")) >= 4


def test_uniform_plans_have_one_setting_for_all_layers(bench: ModuleType) -> None:
    """A layer that lacks it, as the 576 features of `down_proj` lack groups of 128, has the one
    of nearest bytes; of ranks the largest fraction that fits is taken."""
    rewrites = ["linear.quantized", "linear.low_rank", "linear.low_rank_quantized"]
    made = bench.Bench(rewrites, argparse.Namespace(windows=3, length=32))
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


def labels(plan: Any) -> Counter[str]:
    return Counter(proposal.candidate.label for proposal in plan)
