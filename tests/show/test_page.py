"""What the page looks like, measured in a real browser: nothing cut off, unreadable or overlapping,
and nothing that colour alone tells."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fxopt.ir.budget import Budget
from fxopt.ir.errors import RowResult
from fxopt.ir.plan import Plan
from fxopt.show.joint import decided
from tests.show.browser import Tab, needs_browser
from tests.show.synthetic import llama

pytestmark = needs_browser
Show = Callable[..., Tab]

CUT_OFF = """
cells => cells.filter(cell => cell.scrollWidth > cell.clientWidth + 1
  || cell.getBoundingClientRect().bottom > cell.parentElement.getBoundingClientRect().bottom + 1)
  .map(cell => cell.innerText)
"""
BOXES = """
nodes => nodes.map(node => { const box = node.getBoundingClientRect();
  return [box.left, box.top, box.right, box.bottom]; })
"""


def meet(one: list[float], other: list[float], slack: float = 1.0) -> bool:
    return all(one[i] + slack < other[i + 2] and other[i] + slack < one[i + 2] for i in (0, 1))


@pytest.mark.parametrize("width", [360, 768, 1100, 1440])
def test_no_cell_of_the_table_is_cut_off(tab: Show, small: Plan, width: int) -> None:
    plan = small.model_copy(deep=True)
    plan.rewritten[0].label = "rank128+int4-g64 of a rewrite with a long name"
    plan.rewritten[1].key = "model.layers.1.cross_attention.query_projection.inner"
    shown = tab(plan, width)
    assert shown.page.locator(".row.body").count() > 5
    assert shown.page.eval_on_selector_all(".row.body > *", CUT_OFF) == []


def test_names_are_shortened_to_the_eye_alone(tab: Show, small: Plan) -> None:
    shown = tab(small)
    key = small.rewritten[0].key
    assert shown.text(".row.body code") == f"…{key.removeprefix('model.layers.')}"
    cell = shown.page.locator(".row.body .key").first
    assert cell.get_attribute("title") == key
    assert key in (cell.get_attribute("aria-label") or "")
    assert "… is model.layers." in shown.text(".keys").replace("\n", "")


def test_narrow_rows_keep_layer_time_and_bytes(tab: Show, small: Plan) -> None:
    shown = tab(small, 390)
    decision = next(d for d in small.rewritten if d.family == "linear")
    shown.page.fill("#filter", decision.key)
    row = shown.page.locator(".row.body").first
    for part in (f"…{decision.key.removeprefix('model.layers.')}", " µs", "MiB"):
        assert part in row.inner_text()
    for name in ("seconds", "bytes", "key"):
        assert row.locator(f".{name}").is_visible()


WIDER_THAN_THE_PAGE = (
    "cells => cells.filter(c => c.getBoundingClientRect().right > innerWidth + 1)"
    ".map(c => c.innerText)"
)


def test_tables_of_figures_stack_where_they_would_be_cut(tab: Show, small: Plan) -> None:
    for width in (360, 480):
        shown = tab(small, width)
        for table in (".tried", ".stacks:not(.tried)"):
            cells = f"{table} td, {table} th"
            assert shown.page.locator(f"{table} td[data-label]").count() >= 3
            assert shown.page.eval_on_selector_all(cells, WIDER_THAN_THE_PAGE) == []
        labels = shown.page.eval_on_selector_all(
            ".tried td[data-label]", "all => all.map(c => getComputedStyle(c, '::before').content)"
        )
        assert '"latency"' in labels
    assert not tab(small, 1440).page.is_visible(".hint >> nth=-1")


def test_every_state_has_a_mark_of_its_own(tab: Show) -> None:
    plan = llama(2, 1)
    next(d for d in plan.rewritten if d.family == "linear").locked = True
    shown = tab(plan)
    marks = shown.page.eval_on_selector_all(
        ".row.body .mark", "marks => marks.map(mark => [mark.ariaLabel, mark.innerText])"
    )
    assert {(name, mark) for name, mark in marks} == {
        ("rewritten", "~"), ("locked", "!"), ("kept", "="), ("refused", "x"),
    }  # fmt: skip
    for kind, sign in (("rewritten", "~"), ("added", "+"), ("removed", "−")):
        signs = shown.page.eval_on_selector_all(
            f"#graph .node.{kind}", "nodes => nodes.map(n => n.querySelector('.sign')?.textContent)"
        )
        assert set(signs) <= {sign}
        assert shown.page.eval_on_selector(f".legend .i-{kind}", "icon => icon.textContent") == sign
    assert "✓ holds" in shown.text(".card .verdict.good")
    assert "✗" in shown.text(".tried")
    shapes = {
        kind: shown.page.eval_on_selector(
            f"#scatter .legend .point.{kind}",
            "group => [...group.children].map(part => part.getAttribute('d') ?? part.tagName)",
        )
        for kind in ("taken", "fails", "looser", "original")
    }
    assert len({"".join(parts) for parts in shapes.values()}) == 4


@pytest.mark.parametrize("every", [False, True])
def test_text_in_graphs_is_legible_and_stays_in_its_box(tab: Show, every: bool) -> None:
    plan = llama(1, 2)
    long = "a_very_long_parameter_name_of_a_module"
    plan.blocks[0].lines = [line.replace("q_proj.down", long) for line in plan.blocks[0].lines]
    shown = tab(plan)
    if every:
        shown.page.check("#whole")
    found = shown.page.eval_on_selector_all(
        "#graph .node text",
        """texts => texts.map(text => {
          const [box, rect] = [text, text.parentElement.querySelector('rect')].map(
            one => one.getBoundingClientRect());
          const svg = text.ownerSVGElement;
          const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
          return [parseFloat(getComputedStyle(text).fontSize) * scale, rect.right - box.right];
        })""",
    )
    assert found
    assert min(size for size, _ in found) >= 10
    assert min(room for _, room in found) > 0


def test_graphs_have_arrows_and_are_enlarged_by_button_and_key(tab: Show, small: Plan) -> None:
    shown = tab(small)
    edges = shown.page.locator("#after .edge").count()
    assert edges > 10
    assert shown.page.locator("#after .arrow").count() == edges
    sizes = [shown.text("#zoom")]
    shown.page.click(".zoom button[aria-label=larger]")
    sizes.append(shown.text("#zoom"))
    shown.page.focus("#after")
    shown.press("+")
    sizes.append(shown.text("#zoom"))
    percents = [int(size.rstrip("%")) for size in sizes]
    assert percents == sorted(set(percents))
    shown.press("0")
    canvas = "canvas => canvas.scrollWidth <= canvas.clientWidth"
    assert shown.page.eval_on_selector("#before", canvas)
    shown.page.click(".zoom button[aria-label=larger]")
    shown.page.click(".zoom button[aria-label=larger]")
    shown.page.eval_on_selector("#after", "canvas => { canvas.scrollTop = 40; }")
    shown.wait("document.querySelector('#before').scrollTop === 40")


@pytest.mark.parametrize(("width", "stacked"), [(1440, False), (1090, True), (390, True)])
def test_panels_are_stacked_where_there_is_no_room(
    tab: Show, small: Plan, width: int, stacked: bool
) -> None:
    (before, after) = tab(small, width).page.eval_on_selector_all(".panel", BOXES)
    assert (after[1] >= before[3]) == stacked


def test_scatter_says_its_points(tab: Show, small: Plan) -> None:
    shown = tab(small)
    label = shown.page.get_attribute("#scatter svg[role=img]", "aria-label")
    # what is minimised against the row that binds
    assert label.startswith("latency against weights")
    assert "this plan at 5.56 GiB, 1 s" in label
    assert "the original at 14.9 GiB, 2.5 s" in label
    assert "trial 1, does not hold at 11.1 GiB, 900 ms" in label
    assert "with weights up to 6.98 GiB (predicted) at 6.52 GiB, 800 ms" in label
    assert "not solved" in shown.text(".figures:not(.tried)")


def test_trials_that_were_not_timed_stand_by_what_the_plan_measured(tab: Show) -> None:
    """The plan was predicted 1 s and took 2 s, so that a trial predicted 900 ms stands at 1.8 s."""
    plan = llama(2, 2)
    plan.totals.append(RowResult("latency", None, 1.0, 2.0, "s", before=2.5))
    label = tab(plan).page.get_attribute("#scatter svg[role=img]", "aria-label") or ""
    assert re.search(r"this plan at [0-9.]+ GiB, 2 s", label)
    assert re.search(r"trial 1, does not hold at [0-9.]+ GiB, 1.8 s", label)


def crowded() -> Plan:
    """Ten trials of which some measured the same, others a hundred times more."""
    plan = llama(1, 1)
    taken = plan.trials[1]
    rows = {row.name: row for row in taken.rows}
    kl_too = {"row": "kl", "limit": 0.04, "unit": "nats"}
    plan.trials, plan.prices = [taken], []
    plan.looser = [plan.looser[0].model_copy(update=kl_too)]
    plan.budget, plan.totals = Budget(kl=0.02), [row for row in plan.totals if row.name == "kl"]
    for number in range(10):
        error = 0.011 * (1 if number % 2 else 120.0 ** (number / 9))
        kl = replace(rows["kl"], measured=error)
        plan.trials.append(taken.model_copy(update={"rows": [kl, rows["latency"]], "taken": False}))
    return plan


def test_points_and_names_do_not_cover_each_other(tab: Show) -> None:
    page = tab(crowded()).page
    points = page.eval_on_selector_all("#scatter svg[role=img] .point", BOXES)
    names = page.eval_on_selector_all("#scatter .point-name", BOXES)
    assert len(points) == 13
    assert len(names) == 2
    assert not [pair for pair in itertools.combinations(points, 2) if meet(*pair, slack=2)]
    assert not [pair for pair in itertools.product(names, points) if meet(*pair, slack=3)]
    assert not [pair for pair in itertools.combinations(names, 2) if meet(*pair, slack=3)]
    for axis in page.eval_on_selector_all("#scatter .axis text, #scatter .limit-name", BOXES):
        assert not [name for name in names if meet(name, axis, slack=3)]


def test_axes_are_logarithmic_where_values_are_far_apart(tab: Show, small: Plan) -> None:
    assert "kl in nats, logarithmic" in tab(crowded()).text("#scatter")
    assert "logarithmic" not in tab(small).text("#scatter")


def test_the_frontier_goes_through_the_points_that_nothing_betters(tab: Show, small: Plan) -> None:
    line = tab(small).page.get_attribute("#scatter svg[role=img] .frontier", "d")
    # this plan has the smallest weights, and the looser limit would be the fastest
    assert (line.count("M"), line.count("H")) == (1, 1)


def test_paper_has_the_alternatives_and_no_controls(tab: Show, small: Plan) -> None:
    shown = tab(small)
    assert not shown.page.is_visible("#appendix")
    shown.page.emulate_media(media="print")
    shown.page.wait_for_selector("#appendix section")
    text = shown.text("#appendix")
    for decision in (d for d in decided(small) if d.rewritten):
        assert decision.key in text
        assert all(other.reason in text for other in decision.alternatives)
    for control in ("#filter", "#theme", ".zoom", "#details", "#tree"):
        assert not shown.page.is_visible(control)


def other_plan(plan: Plan) -> Plan:
    other = plan.model_copy(deep=True)
    changed = next(d for d in other.rewritten if d.family == "linear")
    label = next(o.label for o in changed.alternatives if o.label and o.feasible)
    changed.choose(changed.rewrite, label)
    block = next(b for b in other.blocks if changed.key.startswith(f"{b.modules[0]}."))
    site = changed.key.removeprefix(f"{block.modules[0]}.")
    at = next(i for i, x in enumerate(block.lines) if x[0] == "+" and x.endswith(f" at {site}"))
    block.lines[at] = block.lines[at].replace("monarch_linear", "low_rank_linear")
    other.totals[0] = replace(other.totals[0], measured=5.5e9)
    return other


def test_a_diff_shows_both_budgets_sums_and_graphs(tab: Show, small: Plan) -> None:
    other = other_plan(small)
    shown = tab(small.diff(other))
    (key,) = shown.rows()
    page: Any = shown.page
    assert page.locator("h2:has-text('Budget of the')").count() == 2
    assert page.locator(".card").count() == 6
    sums = shown.text("table.narrow")
    old, new = small.find(key, "linear"), other.find(key, "linear")
    assert old.cost.weight_bytes != new.cost.weight_bytes
    for word in ("weights", "time", "error", "%"):
        assert word in sums
    (before,) = page.locator("#before .node.selected").all()
    (after,) = page.locator("#after .node.selected").all()
    assert "monarch" in before.get_attribute("aria-label")
    assert "low_rank" in after.get_attribute("aria-label")
    assert page.locator("#after .node.rewritten").count() == 1
    assert page.eval_on_selector_all(".row.body > *", CUT_OFF) == []


def test_a_diff_lists_what_differs(tab: Show, small: Plan) -> None:
    other = small.model_copy(deep=True)
    changed = other.find("model.layers.1.mlp.up_proj", "linear")
    changed.choose("linear.monarch", "option7")
    removed = other.decisions.pop()
    shown = tab(small.diff(other))
    assert shown.rows() == [changed.key, removed.key]
    assert shown.text("#details .what").startswith("~ changed:")
    assert "option7" in shown.text("#details .what")
    assert "chosen by hand" in shown.text("#details")
    assert small.find(changed.key, "linear").reason in shown.text("#details")


@pytest.mark.parametrize("width", [360, 900, 1440])
def test_cards_fill_their_lines_and_hold_their_texts(tab: Show, small: Plan, width: int) -> None:
    plan = small.model_copy(deep=True)
    plan.totals += [
        RowResult("kv_cache", 6e6, 5.9e6, 5.97e6, "bytes", before=1.6e7),
        RowResult("latency", None, 1.0, 1.1, "s", before=2.5),
    ]
    shown = tab(plan, width)
    boxes = shown.page.eval_on_selector_all(".cards .card", BOXES)
    *cards, together = boxes
    left, right = (round(x) for x in shown.page.eval_on_selector_all(".cards", BOXES)[0][::2])
    # what all sites are together has a line of its own
    assert [round(x) for x in together[::2]] == [left, right]
    assert together[1] >= max(box[3] for box in cards)
    if width == 1440:
        assert len({box[1] for box in cards}) == 1
        assert round(cards[-1][2]) == right
    texts = shown.page.locator(".card dd, .card dt")
    assert (
        shown.page.eval_on_selector_all(
            ".card", "cards => cards.filter(card => card.scrollWidth > card.clientWidth)"
        )
        == []
    )
    assert texts.count() > 10
