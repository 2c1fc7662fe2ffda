"""benchmarks/attention_quality.py: its table at small sizes, and the drawing of curves."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

from fxopt.ir.rewrite import Candidate
from fxopt.passes.attention.window import Window

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    for known in ("attention_quality", "curves_plot", "training_plot"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    return importlib.import_module(name)


def test_points_are_drawn_by_share_and_by_power_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    plot = loaded("curves_plot", monkeypatch)
    lines = [
        plot.Line("attention.<a>", False, [(0.25, 0.1), (0.5, 0.01)]),
        plot.Line("attention.<a>", True, [(0.25, 0.01), (0.75, 0.001)]),
        plot.Line("all masks", True, [(0.5, 0.001)]),
    ]
    words = plot.Words("<KL>", "FLOPs", "each by itself", "all alike", "{:.0%} at {:g}")
    page = ElementTree.fromstring(plot.svg(lines, words))
    titled = [c for c in page.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    x, y = ([float(c.get(axis, "")) for c in titled] for axis in ("cx", "cy"))
    assert x[0] == x[2]
    assert x[1] - x[0] == pytest.approx(x[3] - x[1], abs=0.2)
    assert y[0] < y[1] == y[2] < y[3] == y[4]
    assert y[1] - y[0] == pytest.approx(y[3] - y[1], abs=0.2)
    colours = [c.get("stroke") for c in titled]
    assert len(set(colours[:4])) == 1
    assert colours[4] != colours[0]
    assert [c.get("fill") for c in titled[:3]] == ["none", "none", colours[0]]
    texts = ["".join(t.itertext()) for t in page.iter(f"{SVG}text")]
    assert {"<a>", "all masks", "0.001", "0.1"} <= set(texts)
    assert {"<KL>", "FLOPs", "each by itself", "all alike"} <= set(texts)
    said = [c.findtext(f"{SVG}title") for c in titled]
    assert said[0] == "attention.<a>, all alike: 25% at 0.1"
    assert said[-1] == "all masks, each by itself: 50% at 0.001"


def test_what_is_corrected_is_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    bench = loaded("attention_quality", monkeypatch)
    for label, name in (("w512", "attention.window"), ("w512+d64", "attention.window+d64")):
        proposal = SimpleNamespace(rewrite=Window(), candidate=Candidate("", label, {}))
        assert bench.mask_of(proposal) == name


@pytest.mark.slow
def test_the_table_sets_the_solved_plan_beside_its_rivals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    bench = loaded("attention_quality", monkeypatch)
    drawing = tmp_path / "curves.svg"
    map_of_heads = tmp_path / "heads.svg"
    arguments = "--length 1024 --sequences 3 --windows 1 --documents 2 --device cpu"
    files = ["--svg", str(drawing), "--heads", str(map_of_heads)]
    monkeypatch.setattr(sys, "argv", ["attention_quality.py", *arguments.split(), *files])
    bench.main()
    shown = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown if line[0] == "|"]
    _, _, dense, solved, window, *others = rows
    assert dense[:3] == ["dense", "1.000", "0"]
    assert solved[0].startswith("solved: ")
    assert "w256+s16" in solved[0]
    assert float(solved[1]) < 0.75
    assert 0 < float(solved[2]) < float(window[2])
    # as many FLOPs, to what one more key in the window is
    assert float(solved[1]) <= float(window[1]) < float(solved[1]) + 0.01
    assert not others, "tiles are not left out of so few tokens"
    lines = [json.loads(line) for line in shown if line[0] == "{"]
    assert [(line["mask"], line["solved"]) for line in lines] == [
        ("attention.window", False), ("attention.window", True), ("all masks", True),
    ]  # fmt: skip
    ElementTree.parse(drawing)
    assert "of their attention kept" in map_of_heads.read_text("utf-8")
