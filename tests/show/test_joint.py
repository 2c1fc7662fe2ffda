"""Attention and cache of a head are shown as the one decision that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxopt.cli import run
from fxopt.ir.cost import Cost
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan, Refused
from fxopt.show import diff, explain, html, markdown, summary, text
from fxopt.show.entries import entries
from fxopt.show.joint import JOINT, Joined, decided
from tests.show.browser import Tab, needs_browser
from tests.show.synthetic import llama

KEY = "model.layers.0.self_attn/kv=0"


def half(family: str, name: str, seconds: float, size: int, errs: float, **more: Any) -> Decision:
    """A rewritten attention or cache; `more` is of the alternative that keeps it."""
    return Decision(
        key=KEY,
        family=family,  # pyright: ignore[reportArgumentType]
        rewrite=f"{family}.{name}",
        label=f"{name}9",
        parameters={"sink": len(name), name: 9},
        cost=Cost(seconds, 0, size, 64 * len(name)),
        error=errs,
        reason=f"saves much; decided with the other than {name}",
        alternatives=[Alternative(rewrite=KEEP, **more)],
        calls={"prefill": seconds / 2, "decode": seconds / 2},
        timed=["decode"] if family == "attention" else ["decode", "prefill"],
        error_measured=True,
    )


@pytest.fixture
def plan() -> Plan:
    """A window and a packed cache; the pair was 10 ms and 100 KiB, and each half conditional."""
    made = llama(1, 1)
    attention = half("attention", "window", 6e-3, 0, 1e-3, cost=Cost(13e-3), error=-5e-4)
    cache = half(
        "kv_cache", "blocks", 1e-3, 30 << 10, 2.5e-3, cost=Cost(0, 0, 100 << 10), error=0.0
    )
    made.decisions = [attention, cache, *made.decisions[2:]]
    pair = made.pairs[0]
    pair.choices = [attention.choice, cache.choice]
    pair.kept.cost, pair.reason = Cost(10e-3, 0, 100 << 10), "1.43x speed, saves 70 KiB"
    pair.error_measured = True
    return made


def only(plan: Plan) -> Joined:
    (found,) = [d for d in decided(plan) if isinstance(d, Joined)]
    return found


def test_an_interval_is_that_of_the_one_that_changes(plan: Plan) -> None:
    assert only(plan).error_within is None
    attention, cache, *_ = plan.decisions
    assert cache.rewritten
    attention.rewrite, attention.label, attention.error, cache.error_within = KEEP, "", 0.0, 2e-4
    assert only(plan).error_within == 2e-4


def test_costs_and_errors_are_those_of_both(plan: Plan) -> None:
    joined = only(plan)
    assert joined.choice == "attention.window window9 + kv_cache.blocks blocks9"
    assert joined.cost == Cost(6e-3 + 1e-3, 0, 30 << 10, 64 * 6)
    assert joined.error == pytest.approx(3.5e-3)
    assert joined.kept == Cost(10e-3, 0, 100 << 10)
    assert joined.calls == {"prefill": pytest.approx(3.5e-3), "decode": pytest.approx(3.5e-3)}
    assert joined.timed == ["decode"]
    assert joined.error_measured is True
    assert joined.parameters == {
        "attention.sink": 6, "window": 9, "kv_cache.sink": 6, "blocks": 9,
    }  # fmt: skip


def test_alternatives_change_one_of_both_or_keep_both(plan: Plan) -> None:
    both, without_window, without_blocks = only(plan).alternatives
    assert (both.rewrite, both.cost, both.error) == (KEEP, Cost(10e-3, 0, 100 << 10), 0.0)
    assert f"{without_window.rewrite} {without_window.label}" == "kv_cache.blocks blocks9"
    assert without_window.cost == Cost(13e-3 + 1e-3, 0, 30 << 10, 64 * 6)
    assert without_window.error == pytest.approx(2e-3)
    assert f"{without_blocks.rewrite} {without_blocks.label}" == "attention.window window9"
    assert without_blocks.cost == Cost(6e-3, 0, 100 << 10, 64 * 6)


def test_it_is_one_entry_everywhere(plan: Plan) -> None:
    (entry,) = [entry for entry in entries(plan) if entry.key == KEY]
    assert (entry.mark, entry.family, entry.reasons) == ("~", JOINT, ("1.43x speed, saves 70 KiB",))
    assert entry.stored == plan.decisions[:2]
    what = "attention.window window9 + kv_cache.blocks blocks9"
    cost = "cache 100 KiB -> 30 KiB, temporary 0 B -> 384 B, time 10 ms -> 7 ms, error 0.0035"
    shown = " ".join(text.render(plan, colours=False).split())
    assert f"attention + kv_cache: 1 of 1 heads rewritten ~ {KEY} {what}" in shown
    assert f"{cost} measured 1.43x speed, saves 70 KiB" in shown
    for other in ("decided with", "-0.0005", "13 ms"):
        assert other not in shown
    for site, family in ((KEY, None), (KEY, "attention"), (KEY, "kv_cache"), (KEY, JOINT)):
        said = " ".join(explain.render(plan, site, family, colours=False).split())
        assert said.count(f"~ {KEY}") == 1
        assert f"> {what} (7 ms, 30 KiB, error 0.0035): chosen" in said
        assert "- keep it (10 ms, 100 KiB, error 0)" in said
    assert markdown.render(plan).count(KEY) == 1
    lines = summary.lines(plan)["rewritten"]
    assert [line.what for line in lines if KEY in line.keys] == [what]
    page = html.render(plan)
    data = json.loads(page.split('type="application/json">')[1].partition("</script>")[0])
    assert [data["texts"][key] for key in data["sites"][2]].count(KEY) == 1


def test_sums_of_sites_begin_with_both_as_they_were(plan: Plan) -> None:
    plan.decisions = plan.decisions[:2]
    sums = {name: (before, after) for name, before, after, _ in summary.at_sites(plan)}
    assert sums == {"cache": ("100 KiB", "30 KiB"), "time": ("10 ms", "7 ms")}


def test_one_that_is_kept_says_why_by_its_name(plan: Plan) -> None:
    attention = plan.decisions[0]
    attention.choose(KEEP)
    attention.reason = "no candidate pays"
    plan.refusals = [
        Refused(family="attention", key=KEY, rewrite="attention.block_topk", reason="too short"),
        Refused(family="kv_cache", key=KEY, reason="nothing else"),
    ]
    plan.pairs = []
    (entry,) = [entry for entry in entries(plan) if entry.key == KEY]
    assert entry.what == "kv_cache.blocks blocks9"
    assert entry.reasons == (
        "saves much; decided with the other than blocks",
        "kv_cache: nothing else",
        "attention: no candidate pays",
        "attention.block_topk: too short",
    )
    joined = only(plan)
    # both kept is known from the half that is rewritten
    assert joined.kept == attention.cost + Cost(0, 0, 100 << 10)


def test_what_was_said_of_both_is_dropped_once_one_was_changed(plan: Plan) -> None:
    plan.decisions[1].choose(KEEP)
    joined = only(plan)
    assert joined.reason == ""
    (entry,) = [entry for entry in entries(plan) if entry.key == KEY]
    assert "1.43x" not in "".join(entry.reasons)
    assert "kv_cache: chosen by hand" in entry.reasons
    # what both were is known whatever was changed
    assert joined.kept == Cost(10e-3, 0, 100 << 10)
    keep = next(other for other in joined.alternatives if other.rewrite == KEEP)
    assert keep.reason == ""


def test_without_what_both_were_nothing_is_made_up(plan: Plan) -> None:
    plan.pairs = []
    joined = only(plan)
    assert joined.kept is None
    assert "time 7 ms" in text.saving([joined])
    assert "->" not in text.saving([joined])


def test_locks_of_one_and_of_both(plan: Plan) -> None:
    plan.decisions[0].locked = True
    (entry,) = [entry for entry in entries(plan) if entry.key == KEY]
    assert entry.mark == "~"
    assert "attention: locked" in entry.reasons
    plan.decisions[1].locked = True
    (entry,) = [entry for entry in entries(plan) if entry.key == KEY]
    assert entry.mark == "!"


def test_a_difference_of_one_half_shows_the_head_once(plan: Plan) -> None:
    other = plan.model_copy(deep=True)
    other.decisions[1].choose(KEEP)
    other.decisions[0].locked = True
    found = diff.render(plan.diff(other), colours=False)
    assert "Diff: 1 changed, 0 added, 0 removed" in found
    line = next(line for line in found.splitlines() if KEY in line)
    first = "attention.window window9 (sink=6, window=9)"
    assert "attention + kv_cache" in found
    assert f"{first} + kv_cache.blocks blocks9 (sink=6, blocks=9) ->" in " ".join(found.split())
    assert line.strip().startswith("~")
    assert f"-> {first}, attention locked" in " ".join(found.split())
    assert "Diff: 1 changed" in html.render_diff(plan.diff(other))
    assert not plan.diff(plan.model_copy(deep=True))


def test_the_command_gives_both_decisions_as_they_are_stored(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plan.save(tmp_path / "plan.json")
    assert run(["explain", str(path), KEY, "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [site["family"] for site in sites] == ["attention", "kv_cache"]
    assert [site["decision"]["rewrite"] for site in sites] == [
        "attention.window", "kv_cache.blocks",
    ]  # fmt: skip
    assert sites[0]["reasons"] == sites[1]["reasons"] == ["1.43x speed, saves 70 KiB"]


@needs_browser
def test_on_the_page(tab: Callable[..., Tab], plan: Plan) -> None:
    shown = tab(plan)
    assert shown.rows().count(KEY) == 1
    for family in ("attention", "kv_cache", JOINT):
        shown.page.evaluate(f"location.hash = encodeURIComponent({f'{family}:{KEY}'!r})")
        shown.wait("document.querySelector('#details h3')?.innerText.includes('self_attn/kv=0')")
    details = shown.text("#details")
    assert "Attention and cache of a head are chosen as one" in details
    options = shown.page.eval_on_selector_all(
        "#details tr.option th", "cells => cells.map(cell => cell.innerText)"
    )
    assert sorted(options) == [
        "blocks blocks9", "keep it", "window window9", "▸ window window9 + blocks blocks9",
    ]  # fmt: skip
