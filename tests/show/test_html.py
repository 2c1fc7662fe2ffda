"""The page as text: self-contained, and no text of a plan becomes markup, with or without it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Block, Looser
from fxopt.ir.plan import Plan
from fxopt.ir.workload import Train
from fxopt.show import html, kernels, summary
from fxopt.show.entries import counted, ops_of
from tests.show.synthetic import llama

ROOT = Path(__file__).resolve().parents[2]
VENDOR = Path(html.__file__).parent / "vendor"
DAGRE = "54a503e346f93ca0bb10abe7999587e037262935687aca45eb4e4b0f64bbb578"
VOID = {"meta", "link", "br", "img", "input"}
HOSTILE = "</script><img onerror=\"alert('x')\"><!--<b>"


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes, the texts of scripts and all other text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID and tag != "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts[0])


def test_page_says_rows_changes_and_refusals_without_a_script(plan: Plan) -> None:
    page = Page(html.render(plan))
    for text in (
        "Plan: 15 rewritten, 3 kept, 3 refused (2 locked)",
        "40% = 410 KiB",
        "exceeded by 2.5%",
        "model.layers.{0..3}.mlp.gate_proj",
        "saves 1.1..1.4 MiB for 0.0005..0.0008 nats",
        "500 input features have no square factor",
        "calibrated on the example inputs alone",
        "kv_cache could not be kept",
    ):
        assert text in page.text


def test_data_holds_every_decision_and_alternative(plan: Plan) -> None:
    data = data_of(Page(html.render(plan)))
    marks, _, keys, reasons, _, errors, _, lists, flags = data["sites"]
    texts = [data["texts"][key] for key in keys]
    assert texts[: len(plan.decisions)] == [decision.key for decision in plan.decisions]
    assert errors[: len(plan.decisions)] == pytest.approx([d.error for d in plan.decisions])
    for index, decision in enumerate(plan.decisions):
        assert bool(flags[index] & 1) == decision.locked
        found = [] if lists[index] < 0 else data["alternatives"][lists[index]]
        assert len(found) == 5 * len(decision.alternatives)
        if decision.reason:
            assert decision.reason in [data["texts"][reason] for reason in reasons[index]]
    assert marks.count("x") == 3


def test_equal_alternatives_are_stored_once(plan: Plan) -> None:
    data = data_of(Page(html.render(plan)))
    with_some = {tuple(d.model_dump_json() for d in x.alternatives) for x in plan.decisions}
    assert len(data["alternatives"]) == len(with_some - {()})


def test_page_is_self_contained(plan: Plan) -> None:
    source = html.render(plan)
    page = Page(source)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in {"src", "onclick"}]
    links = [value for name, value in page.attributes if name == "href"]
    assert links == ["#decisions", "https://github.com/dagrejs/dagre"]
    assert "url(" not in source
    assert "@import" not in source
    assert "sourceMappingURL" not in source


def test_policy_names_the_scripts_and_the_style_alone(plan: Plan) -> None:
    source = html.render(plan)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', source)
    assert policy is not None
    allowed = policy[1].replace("&#39;", "'")
    inline = [*Page(source).scripts[1:], re.search("<style>(.*?)</style>", source, re.S)[1]]  # pyright: ignore[reportOptionalSubscript]
    digests = [hashlib.sha256(text.encode()).digest() for text in inline]
    for digest in digests:
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in allowed
    assert allowed.startswith("default-src 'none';")
    assert "unsafe" not in allowed


def test_text_of_a_plan_is_escaped_everywhere(plan: Plan) -> None:
    harmless = Page(html.render(plan))
    # all sites that are listed as one, so that what is listed stays the same
    for decision in plan.decisions[:1]:
        decision.reason = decision.label = decision.key = HOSTILE
        decision.alternatives[0].reason = decision.alternatives[0].label = HOSTILE
    plan.decisions[0].kernel = {HOSTILE: HOSTILE}
    plan.refusals[0].reason = plan.refusals[0].key = HOSTILE
    plan.totals[0] = RowResult(HOSTILE, 1.0, 1.0, 1.0, HOSTILE, 1.0)
    plan.looser = [Looser(row=HOSTILE, limit=2.0, unit=HOSTILE, rows=plan.totals)]
    plan.notes = [HOSTILE]
    plan.hardware = {"name": HOSTILE}
    plan.created_by = HOSTILE
    page = Page(html.render(plan))
    assert "img" not in page.tags
    assert page.tags.count("script") == harmless.tags.count("script")
    assert page.text.count(HOSTILE) >= 12
    assert HOSTILE in data_of(page)["texts"]
    assert "<" not in page.scripts[0]


def test_infinite_costs_and_errors_are_written(plan: Plan) -> None:
    plan.decisions[0].error = plan.decisions[0].alternatives[0].error = float("inf")
    plan.totals[0] = RowResult("latency", 1.0, None, float("inf"), "s", 1.0)
    data = data_of(Page(html.render(plan)))
    assert data["sites"][5][0] == "inf"
    assert data["rows"][0]["measured"] == "inf"


def test_to_html_writes_the_file(plan: Plan, tmp_path: Path) -> None:
    path = plan.to_html(tmp_path / "new" / "plan.html")
    assert path.read_text(encoding="utf-8") == html.render(plan)
    assert [file.name for file in path.parent.iterdir()] == ["plan.html"]


def test_diff_page_holds_both_decisions(plan: Plan, tmp_path: Path) -> None:
    other = plan.model_copy(deep=True)
    changed = other.find("model.layers.0.mlp.up_proj")
    changed.choose("keep")
    other.decisions.pop()
    page = Page(plan.diff(other).to_html(tmp_path / "diff.html").read_text(encoding="utf-8"))
    assert "Diff: 1 changed, 0 added, 1 removed" in page.text
    assert data_of(page)["pairs"] == [[0, 1], [2, -1]]
    assert Page(html.render_diff(plan.diff(plan))).text.count("the plans decide the same") == 2


def test_vendored_dagre_is_what_was_published() -> None:
    assert hashlib.sha256((VENDOR / "dagre.min.js").read_bytes()).hexdigest() == DAGRE
    licence = (VENDOR / "dagre.LICENSE.txt").read_text(encoding="utf-8")
    assert licence.startswith("Copyright (c) 2012-2014 Chris Pettitt")
    assert "Permission is hereby granted, free of charge" in licence


def test_a_group_or_its_members_are_counted() -> None:
    plan = llama(1, 1)
    names = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = (plan.find(name) for name in names)
    pair = gate.model_copy(update={"key": f"{gate.key}+up_proj"}, deep=True)
    plan.decisions = [gate, up, down, pair]
    if pair.rewritten:
        pair.choose("keep")
    assert counted(plan.decisions) == [gate, up, down]
    pair.choose("linear.monarch", "option3")
    assert counted(plan.decisions) == [down, pair]
    assert ops_of("a.x+b.y") == ["a.x", "b.y"]
    assert ops_of("x+y") == ["x", "y"]
    assert ops_of("m.attn/kv=3") == ["m.attn"]


def test_kernels_are_their_files_and_triton_stays_unloaded(plan: Plan) -> None:
    code = """
import sys
from fxopt.show import kernels
from tests.show.synthetic import llama
block = llama(1, 1).blocks[0]
assert set(sum(kernels.kernels_at(block).values(), [])) == {"monarch_linear"}
print(kernels.text_of("monarch_linear"))
assert "triton" not in sys.modules and "fxopt.kernels.monarch_linear" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    file = ROOT / "kernels" / "monarch_linear" / "triton.py"
    assert done.stdout.rstrip() == file.read_text(encoding="utf-8").rstrip()


@pytest.mark.parametrize(
    ("call", "folders"),
    [
        (
            "attend(%q, %k, %v, state=%past, layout='k4v4')",
            ["kv_attention", "kv_append", "kv_exact", "kv_int8"],
        ),
        ("attend(%q, %k, %v, window=(16,))", ["attention"]),
        ("attend(%q, %k, %v, top=(100,))", ["attention", "block_topk"]),
        ("attend(%q, %k, %v, top=(100,), hip=(1,))", ["attention", "block_topk", "hip"]),
        ("fxopt.quantized_linear(%x, w u8[8, 8])", ["quantized_linear"]),
        ("fxopt.chunked(%x)", []),
        ("aten.add(%x, 1)", []),
    ],
)
def test_each_call_has_the_kernels_that_it_launches(call: str, folders: list[str]) -> None:
    lines = ["-%y = aten.mul(%x, 1) -> f32[8] at m", f"+%y = {call} -> f32[8] at m", "no call"]
    found = kernels.kernels_at(Block(modules=[""], lines=lines))
    assert found == ({"m": folders} if folders else {})


def test_a_kernel_is_on_the_page_once(plan: Plan) -> None:
    once = (ROOT / "kernels" / "monarch_linear" / "triton.py").read_text("utf-8").splitlines()[0]
    assert html.render(llama(3, 2)).count(once.replace('"', '\\"')) == 1
    assert once.replace('"', '\\"') not in html.render(plan)


def test_cards_say_what_is_minimised_and_the_notes_of_their_rows(plan: Plan) -> None:
    made = llama(1, 1)
    made.notes = ["kl: 99% of 120 positions < 0.3 nats", "calibrated on little"]
    cards = {card.row.name: card for card in summary.cards(made)}
    assert list(cards) == ["latency", "weights", "kl"]
    assert cards["latency"].minimised
    assert "the whole model was not timed" in cards["latency"].notes[0]
    assert cards["kl"].notes == [
        "measured on data that nothing was chosen by",
        "99% of 120 positions < 0.3 nats",
    ]
    assert summary.general_notes(made) == ["calibrated on little"]
    made.totals.append(RowResult("latency", None, 1.0, 1.1, "s", before=2.5))
    cards = {card.row.name: card for card in summary.cards(made)}
    assert cards["latency"].measured == "1.1 s"
    assert cards["latency"].before == "2.5 s"
    page = Page(html.render(made))
    assert "minimised" in page.text


def test_each_total_of_a_quality_row_says_what_it_is() -> None:
    made = llama(1, 1)
    made.trials[1].rows[1] = replace(made.trials[1].rows[1], measured=0.017)
    kl = next(card for card in summary.cards(made) if card.row.name == "kl")
    alone = sum(d.error or 0.0 for d in made.rewritten)
    assert kl.others == [
        ("predicted by the solver", "0.008 nats"),
        ("measured while searching, on other data", "0.017 nats"),
        ("sites added up, each changed alone", f"{alone:.3g} nats"),
    ]
    page = html.render(made)
    first, _, others = page.partition("other totals of kl")
    assert "<dt>measured</dt><dd>0.011 nats</dd>" in first
    assert "0.008 nats" not in first
    assert "predicted by the solver" in others
    assert "kl while searching" in others
    # nothing else is known where nothing was measured
    made.totals[1] = replace(made.totals[1], measured=None)
    assert all(not card.others for card in summary.cards(made))
    assert "<dt>predicted</dt><dd>0.008 nats</dd>" in html.render(made)
    # a training step is measured on the example that it was planned for
    made.totals[1], made.workload = replace(made.totals[1], measured=0.011), Train(1, 1)
    kl = next(card for card in summary.cards(made) if card.row.name == "kl")
    assert (kl.others, kl.notes) == ([], [])


def test_a_plan_that_holds_only_where_it_counts_says_both_values() -> None:
    made = llama(1, 1)
    taken = made.trials[1]
    taken.holds = False
    taken.rows = [replace(r, measured=0.025) if r.name == "kl" else r for r in taken.rows]
    text = Page(html.render(made)).text
    assert "kl is 0.025 nats on the part of the calibration data that the search chose by" in text
    assert "0.011 nats on the part kept for verification" in text
    assert "2, taken" in text
    assert "✗ kl over the limit" in text
    assert "chose by" not in Page(html.render(llama(1, 1))).text.partition("What was tried")[0]


def test_rewrites_on_request_are_named_once(plan: Plan) -> None:
    sentence = "Not tried: linear.low_rank_shared (name them in rewrites=)."
    made = llama(1, 1)
    assert Page(html.render(made)).text.count(sentence) == 1
    assert str(made).count("Not tried: linear.low_rank_shared") == 1
    assert "Not tried" not in str(plan)


def test_a_looser_limit_that_was_not_solved_says_so() -> None:
    made = llama(1, 1)
    assert "not solved in time" in Page(html.render(made)).text
    assert "not solved in time" in made.to_markdown()
    made.looser = made.looser[1:]
    assert "no looser budget was solved in time" in Page(html.render(made)).text
