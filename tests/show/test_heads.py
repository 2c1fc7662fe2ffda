"""The map of heads: every head in its row and column, coloured by what it became."""

from __future__ import annotations

from collections import Counter

from fxopt.ir.cost import Cost
from fxopt.show import html
from fxopt.show.heads import LEAST_SHADE, head_map
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
