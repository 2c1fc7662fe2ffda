"""Memory over a training step: a drawing whose areas add up, its table, and where it is shown."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fxopt.ir.budget import Budget
from fxopt.ir.errors import PlanError, RowResult
from fxopt.ir.evidence import Memory, Policy, Span
from fxopt.ir.plan import Plan
from fxopt.ir.workload import Train
from fxopt.show import html
from fxopt.show import memory as view
from fxopt.show.report import Report
from tests.show.browser import Tab, needs_browser

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20


@pytest.fixture
def memory() -> Memory:
    """Six points over two layers, of which the fourth has the most."""
    return Memory(
        weights=2 * MIB,
        border=3,
        holders={
            "gradients": [0, 0, 0, 0, MIB, 2 * MIB],
            "kept": [MIB, 2 * MIB, 3 * MIB, 3 * MIB, 2 * MIB, 0],
            "again": [0, 0, 0, 2 * MIB, 0, 0],
            "temporary": [MIB // 2] * 6,
        },
        spans=[
            Span(name="model.layers.0", start=0),
            Span(name="model.layers.1", start=2),
            Span(name="model.layers.0", start=4),
        ],
        policies=[
            Policy(rewrite="keep", tensors=3, bytes=3 * MIB, waiting=3 * MIB),
            Policy(
                rewrite="activation.recompute", tensors=2, bytes=4 * MIB, waiting=0, seconds=2e-3
            ),
        ],
        measured=[MIB, 2 * MIB, 3 * MIB, 5 * MIB, 3 * MIB, 2 * MIB],
        limit=6.0 * MIB,
        limited_by="memory",
        peak_at="layers.1.gelu",
    )


@pytest.fixture
def trained(memory: Memory) -> Plan:
    rows = [RowResult("memory", 8.0 * MIB, 7.5 * MIB, 7.0 * MIB, "bytes", before=10.0 * MIB)]
    return Plan(
        created_by="fxopt test",
        budget=Budget(memory="8MiB"),
        workload=Train(batch=1, seq=8),
        totals=rows,
        memory=memory,
    )


def area(path: str) -> float:
    """What a path of horizontal and vertical lines encloses."""
    x = y = 0.0
    corners: list[tuple[float, float]] = []
    for letter, text in re.findall(r"([MHV])([\d. ]+)", path):
        numbers = [float(number) for number in text.split()]
        x, y = numbers if letter == "M" else (numbers[0], y) if letter == "H" else (x, numbers[0])
        corners.append((x, y))
    return abs(sum(a * d - b * c for (a, b), (c, d) in pairwise([*corners, corners[0]]))) / 2


def test_areas_are_as_large_as_what_they_stand_for(memory: Memory) -> None:
    root = ET.fromstring(view.svg(memory))
    areas = [node for node in root.iter(f"{SVG}path") if "area" in (node.get("class") or "")]
    titles = [(node.findtext(f"{SVG}title") or "").partition(":")[0] for node in areas]
    assert titles == [
        "parameters and buffers",
        "gradients",
        "kept for the backward",
        "made again in the backward",
        "temporaries and workspaces",
    ]
    sizes = [area(node.get("d") or "") for node in areas]
    held = [12 * MIB, *(sum(values) for values in memory.holders.values())]
    for size, bytes_ in zip(sizes, held, strict=True):
        assert size / sizes[0] == pytest.approx(bytes_ / held[0], rel=0.02)


def test_it_can_be_read_without_colours_and_without_eyes(memory: Memory) -> None:
    root = ET.fromstring(view.svg(memory))
    assert root.get("role") == "img"
    known = {
        node.get("id"): node.text for node in root if node.tag in (f"{SVG}title", f"{SVG}desc")
    }
    said = [known[name] or "" for name in (root.get("aria-labelledby") or "").split()]
    assert "Bytes alive" in said[0]
    for part in ("7.5 MiB as predicted", "7 MiB as measured", "8 MiB are allowed by memory",
                 "layers.1.gelu", "made again in the backward 2 MiB"):  # fmt: skip
        assert part in said[1]
    patterns = {node.get("id"): ET.tostring(node[1]) for node in root.iter(f"{SVG}pattern")}
    assert len(set(patterns.values())) == len(patterns)
    filled = [node.get("fill") for node in root.iter(f"{SVG}rect") if node.get("fill")]
    assert len(filled) == len(set(filled)) == 3  # of the legend: all but two plain ones
    texts = [node.text for node in root.iter(f"{SVG}text")]
    for text in ("forward ←", "→ backward", "layers.0", "layers.1", "limit 8 MiB, by memory",
                 "predicted peak 7.5 MiB", "measured, at most 7 MiB"):  # fmt: skip
        assert text in texts
    assert texts.count("layers.0") == 2


def test_a_file_of_its_own_has_plain_colours_for_light_and_dark(memory: Memory) -> None:
    text = view.svg(memory)
    assert "light-dark" not in text
    assert "prefers-color-scheme: dark" in text
    assert "var(" not in text
    assert "light-dark" in view.style()
    assert view.drawing(memory) in html.render(
        Plan(budget=Budget(memory=9), workload=Train(1, 1), memory=memory)
    )


def test_layers_without_room_keep_their_tick_and_title(memory: Memory) -> None:
    long = "model.decoder.block_with_a_name_that_is_far_too_long_for_two_points_of_six_to_hold"
    memory.spans[1].name = long
    root = ET.fromstring(view.svg(memory))
    assert long not in "".join(node.text or "" for node in root.iter(f"{SVG}text"))
    titles = [node.text or "" for node in root.iter(f"{SVG}title")]
    assert any(t.startswith(f"{long}, forward: up to 7.5 MiB predicted, 7 MiB") for t in titles)


def test_nothing_measured_nothing_limited(memory: Memory) -> None:
    memory.measured, memory.limit = None, None
    text = view.svg(memory)
    assert 'class="measured"' not in text
    assert 'class="limit"' not in text
    assert "measured" not in view.sentence(memory)
    assert "allowed" not in view.sentence(memory)


def test_the_report_has_the_table(trained: Plan) -> None:
    text = str(trained.report())
    assert view.sentence(trained.memory) in " ".join(text.split())  # pyright: ignore
    lines = [line.split() for line in text.splitlines()]
    assert ["kept", "3", "3", "MiB", "3", "MiB", "-"] in lines
    assert ["activation.recompute", "2", "4", "MiB", "0", "B", "2", "ms"] in lines
    assert "in host memory" not in text
    assert trained.memory is not None
    trained.memory.policies[1].host = 4 * MIB
    heads, rows = view.policies(trained.memory)
    assert heads[4] == "in host memory"
    assert [row[4] for row in rows] == ["0 B", "4 MiB"]


def test_the_report_writes_the_drawing(trained: Plan, tmp_path: Path) -> None:
    path = trained.report().to_svg(tmp_path / "memory.svg")
    assert path.read_text("utf-8") == view.svg(trained.memory)  # pyright: ignore
    with pytest.raises(PlanError, match="Train"):
        Report([]).to_svg(tmp_path / "other.svg")


def test_no_text_of_a_plan_becomes_markup(trained: Plan) -> None:
    assert trained.memory is not None
    hostile = "<img onerror='alert(1)'>"
    trained.memory.spans[0].name = trained.memory.peak_at = hostile
    trained.memory.limited_by = hostile
    page = html.render(trained)
    assert "Memory over the step" in page
    assert hostile not in page
    ET.fromstring(view.svg(trained.memory))


def test_lengths_that_differ_are_refused(memory: Memory) -> None:
    with pytest.raises(ValueError, match="points"):
        Memory(**{**memory.model_dump(), "measured": [1, 2]})
    assert Memory.model_validate_json(memory.model_dump_json()) == memory


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_the_page(tab: Callable[..., Tab], trained: Plan, scheme: str) -> None:
    shown = tab(trained, 1440, color_scheme=scheme)
    fills = shown.page.eval_on_selector_all(
        ".memory .weights, .memory .kept, .memory pattern rect",
        "all => all.map(one => getComputedStyle(one).fill)",
    )
    assert "rgb(0, 0, 0)" not in fills
    assert len(set(fills)) == 8
    narrow = tab(trained, 400, color_scheme=scheme)
    # it scrolls within its frame, in letters that can be read, and not the page
    sizes = "one => [one.scrollWidth > one.clientWidth, one.getBoundingClientRect().right]"
    scrolls, right = narrow.page.eval_on_selector(".wide:has(.memory)", sizes)
    assert scrolls
    assert right <= 400
    letters = "all => Math.min(...all.map(one => one.getBoundingClientRect().height))"
    assert narrow.page.eval_on_selector_all(".memory text", letters) >= 9
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 400
