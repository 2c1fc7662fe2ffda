from __future__ import annotations

import re
from collections.abc import Callable

from markdown_it import MarkdownIt

from fxopt.ir.plan import Plan
from fxopt.show import markdown
from tests.show.synthetic import llama

HOSTILE = "a | b `c` ``` <img src=x onerror=alert(1)> *d* [e](f) @all\n# g"


def html_of(plan: Plan) -> str:
    return MarkdownIt("commonmark").enable("table").render(plan.to_markdown())


def test_markdown_of_a_plan(plan: Plan, golden: Callable[[str, str], None]) -> None:
    golden("plan.md", plan.to_markdown().removesuffix("\n"))


def test_every_table_is_one() -> None:
    text = llama(3, 2).to_markdown()
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert page.count("<table>") == len(re.findall(r"^\| ---", text, re.M))
    assert "model.layers.{0..2}" in page
    assert "What a looser budget would buy" in page


def test_diff_has_the_changed_calls_alone() -> None:
    plan = llama(2, 1)
    (diff,) = re.findall(r"```diff\n(.*?)```", plan.to_markdown(), re.S)
    changed = [line for block in plan.blocks for line in block.lines if line[0] != " "]
    assert [line for line in diff.splitlines() if line[0] != "@"] == changed
    assert diff.startswith("@@ model.layers.0 @@")


def test_text_of_a_plan_is_escaped(plan: Plan) -> None:
    first = plan.decisions[0]
    first.key = first.reason = first.label = plan.created_by = HOSTILE
    plan.refusals[0].reason = plan.refusals[0].key = HOSTILE
    plan.notes = [HOSTILE]
    page = html_of(plan)
    assert "<img" not in page
    assert "<em>" not in page
    assert "<a " not in page
    assert "<h1>" not in page
    cells = [len(re.findall("<t[dh]", row)) for row in re.findall("<tr>.*?</tr>", page, re.S)]
    assert set(cells) == {4, 6}


def test_large_plans_fit_in_a_comment() -> None:
    assert len(llama(32, 8).to_markdown()) < 65_536


def test_code_cannot_be_ended() -> None:
    assert markdown.escape("a|b") == r"a\|b"
