"""The drawing of predictions against measurements, as `benchmarks/prediction.py` makes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def draw() -> Any:
    spec = importlib.util.spec_from_file_location("scatter", ROOT / "benchmarks" / "scatter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.draw


def plan(guess: float, found: float) -> dict[str, dict[str, float]]:
    return {"predicted": {"decode": guess}, "measured": {"decode": found}}


def test_every_plan_is_a_point_where_it_was_predicted_and_measured(draw: Any) -> None:
    models = {
        "calibration": [plan(1.0, 9.0)],
        "small <b>": [plan(0.001, 0.001), plan(0.0011, 0.001)],
        "large": [plan(0.08, 0.1)],
    }
    page = ElementTree.fromstring(draw(models, "a card & host", {"decode": "s"}))
    texts = ["".join(t.itertext()) for t in page.iter(f"{SVG}text")]
    assert "decode: 10.0% median, 20.0% worst" in texts
    assert "a card & host" in texts
    assert "small <b>, 2 plans" in texts
    points = [c for c in page.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert len(points) == 3
    exact, above, below = ((float(c.get("cx")), float(c.get("cy"))) for c in points)  # pyright: ignore
    assert exact[0] == above[0] < below[0]
    assert above[1] < exact[1], "predicted up, so a larger guess stands higher"
    (left, bottom), (_, top) = _diagonal(page)
    # on the diagonal what was met, above it what was predicted too slow
    assert exact[0] - left == pytest.approx(bottom - exact[1], abs=0.2)
    assert below[0] - left > bottom - below[1]
    assert top < bottom


def _diagonal(page: ElementTree.Element) -> list[tuple[float, float]]:
    (path,) = (p.get("d") or "" for p in page.iter(f"{SVG}path") if p.get("stroke-opacity"))
    start, end = path.removeprefix("M").split("L")
    return [tuple(map(float, pair.split())) for pair in (start, end)]  # pyright: ignore
