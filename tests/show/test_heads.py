"""The map of heads: every head in its row and column, coloured by what it became."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

import pytest

from fxopt.ir.cost import Cost
from fxopt.ir.decision import Alternative, KeptMass
from fxopt.ir.errors import PlanError
from fxopt.ir.plan import Plan
from fxopt.show import html
from fxopt.show.heads import BY_MASS, LEAST_SHADE, head_map, roles, svg
from tests.show.synthetic import llama


def test_every_head_has_its_place() -> None:
    plan = llama(layers=3, heads=4)
    heads = [d for d in plan.decisions if d.family == "attention"]
    found = head_map(plan)
    assert found is not None
    assert [name for name, _ in found.names] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert len(found.cells) == len(heads) == 12
    rows, columns = ([y for _, y in found.names], sorted({cell.x for cell in found.cells}))
    caches = {d.key: d for d in plan.decisions if d.family == "kv_cache"}
    for decision, cell in zip(heads, found.cells, strict=True):
        assert cell.title.startswith(decision.key + ": ")
        assert (caches[decision.key].choice in cell.title) or not caches[decision.key].rewritten
        place = f"model.layers.{rows.index(cell.y)}.self_attn/kv={columns.index(cell.x)}"
        assert place == decision.key
        assert cell.label == (decision.label if decision.rewritten else "kept")
        assert (cell.kind == 0) == (not decision.rewritten)
    counted = Counter(cell.label for cell in found.cells)
    assert {label: count for _, label, count in found.counts} == counted


def test_shades_follow_time_and_rewrites_have_colours() -> None:
    plan = llama(layers=1, heads=4)
    heads = plan.decisions = [d for d in plan.decisions if d.family == "attention"]
    for decision, (rewrite, seconds) in zip(
        heads,
        [("attention.window", 1e-4), ("attention.block_topk", 1.6e-4), ("keep", 2e-4),
         ("attention.window", 1e-9)],
        strict=True,
    ):  # fmt: skip
        decision.rewrite, decision.cost = rewrite, Cost(seconds)
        decision.alternatives = [
            other.model_copy(update={"rewrite": "keep", "cost": Cost(2e-4)})
            for other in decision.alternatives[:1]
        ]
    found = head_map(plan)
    assert found is not None
    assert [(c.kind, c.shade) for c in found.cells] == [
        (1, 0.5),
        (2, 0.8),
        (0, 1),
        (1, LEAST_SHADE),
    ]


def test_the_page_draws_it_where_a_head_is_rewritten() -> None:
    plan = llama(layers=2, heads=2)
    for decision in plan.decisions:
        decision.rewrite, decision.label = "keep", ""
    assert head_map(plan) is None
    assert "What each head attends to" not in html.render(plan)
    plan.decisions[0].rewrite, plan.decisions[0].label = "attention.window", "<b>w9"
    plan.decisions.append(plan.decisions[0].model_copy(update={"key": "a/kv=<i>"}))
    page = html.render(plan)
    assert "What each head attends to" in page
    assert page.count('<g class="head k1">') == 1
    assert page.count('<g class="head k0">') == 3
    assert "<b>w9" not in page
    assert "Heads: 3 kept, 1 &lt;b&gt;w9" in page


def mass(mean: float, *, near: bool = True) -> KeptMass:
    return KeptMass(mean=mean, low=mean - 0.02, high=mean + 0.01, near=near)


def masked() -> Plan:
    """Three heads under masks and one that is kept, beside the mask that it was offered."""
    plan = llama(layers=2, heads=2)
    heads = plan.decisions = [d for d in plan.decisions if d.family == "attention"]
    window, tiles, low, kept = heads
    window.rewrite, window.label, window.kept_mass = "attention.window", "<w9>", mass(0.98)
    tiles.rewrite, tiles.label = "attention.block_topk", "top5%"
    tiles.kept_mass = mass(0.75, near=False)
    low.rewrite, low.label, low.kept_mass = "attention.window", "<w9>", mass(0.3)
    kept.rewrite, kept.label = "keep", ""
    for decision in heads:
        decision.alternatives = []
    kept.alternatives = [
        Alternative(rewrite="attention.window", label=f"w{i}", kept_mass=mass(i / 10))
        for i in (4, 6)
    ]
    return plan


def test_shades_follow_kept_mass_where_it_is_known() -> None:
    found = head_map(masked())
    assert found is not None
    assert found.shades == BY_MASS
    assert [c.shade for c in found.cells] == [0.97, 0.62, LEAST_SHADE, 1.0]
    assert [c.text for c in found.cells] == ["<w9> 98%", "top5% 75%", "<w9> 30%", "kept"]
    titles = [c.title for c in found.cells]
    assert titles[1].endswith("keeps 75.0% (95%: 73.0% to 76.0%) of its attention")
    assert titles[3].endswith(
        "other masks: w4 40.0% (95%: 38.0% to 41.0%), w6 60.0% (95%: 58.0% to 61.0%)"
    )


def test_heads_that_hide_keys_without_a_known_mass_are_drawn_by_time() -> None:
    plan = masked()
    other = plan.decisions[0]
    other.kept_mass, other.error = None, 0.001
    found = head_map(plan)
    assert found is not None
    assert found.cells[0].shade == pytest.approx(by_time(plan), abs=0.01)
    assert found.cells[0].text == "<w9>"
    assert roles(plan).endswith(", 1 by other means.")
    other.error = 0.0  # what changes nothing keeps all
    assert head_map(plan).cells[0].shade == 1.0
    assert "other means" not in roles(plan)


def by_time(plan: Plan) -> float:
    """The shade of the first head in a map without masses."""
    bare = plan.model_copy(deep=True)
    for decision in bare.decisions:
        decision.kept_mass, decision.alternatives = None, []
    found = head_map(bare)
    assert found is not None
    return found.cells[0].shade


def test_a_plan_says_which_heads_are_local_retrieve_or_are_dense() -> None:
    plan = masked()
    said = (
        "Heads by what they attend to: 2 local (30% to 98% of their attention kept), 1 retrieving "
        "(75% of their attention kept), 1 dense (masks would keep 60% at most)."
    )
    assert roles(plan) == said
    assert said in " ".join(str(plan).split())
    assert html.render(plan).count(said) == 1
    assert "keeps 98.0%" in plan.explain("model.layers.0.self_attn/kv=0")
    assert "keeps 60.0%)" in plan.explain("model.layers.1.self_attn/kv=1")
    assert roles(llama(layers=1, heads=2)) == ""


def test_the_map_is_a_drawing_of_its_own() -> None:
    plan = masked()
    found = head_map(plan)
    assert found is not None
    page = ElementTree.fromstring(svg(plan))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in page.iter(f"{space}title")]
    assert titles == [cell.title for cell in found.cells]
    cells = [r for r in page.iter(f"{space}rect") if r.get("fill-opacity")]
    assert [float(r.get("fill-opacity", 0)) for r in cells] == [c.shade for c in found.cells]
    assert [r.get("class") for r in cells] == ["k1", "k2", "k1", "k0"]
    for decision in plan.decisions:
        decision.rewrite = "keep"
    with pytest.raises(PlanError, match=r"rewrites no attention head.*packing the cache"):
        svg(plan)
