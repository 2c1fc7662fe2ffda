from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest

from fxopt.ir.budget import Budget
from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Memory, Policy
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan, Refused
from fxopt.ir.workload import Forward, Train
from fxopt.show import page, text

LOW_RANK = {"rewrite": "linear.low_rank", "label": "r8", "parameters": {"rank": 8}}


def shown(*decisions: Decision, columns: int = 100, **fields: Any) -> str:
    fields = {"workload": Forward(), **fields}
    made = Plan(budget=Budget(kl=0.02), decisions=[*decisions], **fields)
    return text.render(made, colours=False, columns=columns)


def test_golden(plan: Plan, golden: Callable[[str, str], None]) -> None:
    golden("plan.txt", text.render(plan, colours=False))


@pytest.mark.parametrize(("measured", "said"), [(3.0, True), (1.04, False), (None, False)])
def test_a_plan_that_takes_longer_says_so(measured: float | None, said: bool) -> None:
    found = shown(totals=[RowResult("latency", None, 0.9, measured, "s", before=1.0)])
    sentence = "slower than the original on this device, 3 s against 1 s (3.0x)"
    assert (sentence in " ".join(found.split())) == said


def test_what_refuses_at_every_site_of_a_family_is_said_once() -> None:
    keys = ("a.query", "b.key", "c.value")
    decisions = [
        Decision(key=key, family="linear", reason=f"no candidate of {key} pays") for key in keys
    ]

    def refused(key: str, reason: str, rewrite: str) -> Refused:
        return Refused(family="linear", key=key, reason=reason, rewrite=rewrite)

    refusals = [refused(key, "of no use here", "linear.monarch") for key in keys]
    refusals.append(refused("a.query", "too wide", "linear.low_rank"))
    found = shown(*decisions, refusals=refusals)
    assert found.count("linear.monarch: of no use here") == 1
    head = "linear: 0 of 3 sites rewritten\n    of all: linear.monarch: of no use here\n"
    assert head in found
    assert "        linear.low_rank: too wide" in found
    alone = shown(decisions[0], refusals=refusals[:1])
    assert "        linear.monarch: of no use here" in alone
    assert "of all" not in alone


def test_print_is_plain_unless_a_terminal(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    plain = str(plan)
    assert "\x1b" not in plain
    monkeypatch.setattr("sys.stdout", Terminal())
    coloured = str(plan)
    assert "\x1b[33m  ~ model" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(plan) == plain


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_no_line_is_wider_than_the_page_unless_a_name_is(plan: Plan, columns: int) -> None:
    plan.decisions[-1].reason = "a long reason of many words " * 12
    plan.decisions[-2].key = "model." + "block." * 30 + "proj"
    _, _, body = text.render(plan, colours=False, columns=columns).partition("\n\n")
    wide = [line for line in body.splitlines() if len(line) > columns]
    assert [line.split()[-1] for line in wide] == [plan.decisions[-2].key]


def test_width_is_that_of_the_terminal_up_to_100(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page.width() == 100
    monkeypatch.setattr(page, "_is_terminal", lambda: True)
    for columns, expected in ((72, 72), (20, 60), (240, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert page.width() == expected


def test_sites_fold_only_with_equal_choice_and_reason() -> None:
    def site(layer: int, **fields: Any) -> Decision:
        return Decision(key=f"layers.{layer}.fc", family="linear", **{**LOW_RANK, **fields})

    same = shown(site(0, reason="a"), site(1, reason="a"))
    assert "~ layers.{0..1}.fc  linear.low_rank r8" in same
    for other in (
        site(1, reason="b"),
        site(1, reason="a", label="r9"),
        site(1, reason="a", parameters={"rank": 9}),
        site(1, reason="a", locked=True),
    ):
        assert "layers.{" not in shown(site(0, reason="a"), other)


def test_numbers_of_folded_reasons_become_a_span() -> None:
    a = Decision(key="a.0", family="linear", reason="error 2e-3 of r64 at 1.5x", **LOW_RANK)
    b = Decision(key="a.1", family="linear", reason="error 1e-4 of r64 at 1.5x", **LOW_RANK)
    assert "error 1e-4..2e-3 of r64 at 1.5x" in shown(a, b)


def test_saving_adds_up_and_leaves_out_what_stays() -> None:
    kept = Alternative(rewrite=KEEP, cost=Cost(1e-3, 4096, 100, 5000))
    decisions = [
        Decision(
            key=f"a.{i}",
            family="linear",
            cost=Cost(0.5e-3, 1024, 100, 3000),
            error=0.25,
            alternatives=[kept],
            **LOW_RANK,
        )
        for i in range(2)
    ]
    expected = (
        "weights 8 KiB -> 2 KiB, temporary 4.88 KiB -> 2.93 KiB, time 2 ms -> 1 ms, error 0.5"
    )
    assert text.saving(decisions) == expected
    decisions[0].alternatives = []
    assert "weights 2 KiB" in text.saving(decisions)
    decisions[0].error = None
    assert "error" not in text.saving(decisions)


def test_relative_errors_of_sites_are_stated_as_that_of_the_whole() -> None:
    cost = Cost(weight_bytes=1024)
    sites = [
        Decision(key=f"a.{i}", family="linear", cost=cost, error=0.02, **LOW_RANK) for i in range(2)
    ]
    plan = Plan(budget=Budget(relative_error=0.3), workload=Forward(), decisions=sites)
    assert text.saving(sites, plan).endswith("error 0.2")
    step = Plan(budget=Budget(relative_error=0.3), workload=Train(1, 2), decisions=sites)
    assert text.saving(sites, step).endswith("error 0.028")
    assert "error 0.141" in plan.explain("a.0")
    assert "error 0.141 ± 0.037" in explained(plan, within=0.01)


def explained(plan: Plan, within: float) -> str:
    """A site's page where its error was measured to `within`."""
    (first, _) = plan.decisions
    first.error_measured, first.error_within = True, within
    first.alternatives = [Alternative(rewrite=KEEP, cost=Cost())]
    return plan.explain("a.0")


def test_always_says_why_not() -> None:
    silent = Decision(key="a", family="linear")
    assert "no rewrite serves this site" in shown(silent)
    silent.alternatives = [
        Alternative(rewrite="linear.low_rank", label="r8", reason="too coarse"),
        Alternative(rewrite="linear.monarch", feasible=False),
        Alternative(rewrite="linear.quantized"),
    ]
    assert (
        "not linear.low_rank r8: too coarse; not linear.monarch: does not fit the budget; "
        "not linear.quantized: not worth its cost" in " ".join(shown(silent).split())
    )


def test_each_site_is_listed_once_and_counted_once() -> None:
    output = shown(
        Decision(key="served", family="linear", reason="best", **LOW_RANK),
        Decision(key="refused", family="linear", reason="linear.monarch: odd"),
        Decision(key="locked", family="linear", reason="asked for", locked=True),
        refusals=[
            Refused(family="linear", key="served", rewrite="linear.monarch", reason="no square"),
            Refused(family="linear", key="refused", rewrite="linear.monarch", reason="odd"),
            Refused(family="linear", key="locked", reason="asked for"),
            Refused(family="attention", key="experts", reason="expert groups are not served"),
        ],
    )
    assert [line.strip() for line in output.partition("\n\n")[2].splitlines()] == [
        "attention: 0 of 1 sites rewritten",
        "x experts  refused",
        "expert groups are not served",
        "",
        "linear: 1 of 3 sites rewritten",
        "~ served  linear.low_rank r8",
        "best",
        "linear.monarch: no square",
        "x refused  refused",
        "linear.monarch: odd",
        "! locked  kept",
        "asked for",
        "",
        "Plan: 1 rewritten, 1 kept, 2 refused (1 locked)",
    ]


def test_empty_plan() -> None:
    output = shown()
    assert output.startswith("Forward()")
    assert output.endswith("Plan: 0 rewritten, 0 kept, 0 refused")


def test_times_of_sites_and_of_the_whole_are_told_apart() -> None:
    site = Decision(key="a", family="linear", cost=Cost(0.2), error=0.0)

    def said(before: float) -> str:
        found = shown(site, totals=[RowResult("latency", None, 0.9, 0.8, "s", before=before)])
        return " ".join(found.split())

    assert "What the model takes beside its sites: 800 ms of the 1 s before" in said(1.0)
    assert "add up to 200 ms, more than the 100 ms of the whole model" in said(0.1)
    assert "beside its sites" not in " ".join(shown(site).split())


def test_temporary_bytes_are_defined_where_they_are_told_of() -> None:
    kept = Alternative(rewrite=KEEP, cost=Cost(1e-3, 4096))
    site = Decision(
        key="a", family="linear", cost=Cost(1e-3, 1024, 0, 64), alternatives=[kept], **LOW_RANK
    )
    assert "temporary: bytes beside weights and cache" in " ".join(shown(site).split())
    site.cost = Cost(1e-3, 1024)
    assert "temporary" not in shown(site)


def test_saved_tensors_wait_all_at_once() -> None:
    def site(name: str) -> Decision:
        kept = Alternative(rewrite=KEEP, cost=Cost(0.0, temporary_bytes=4096))
        return Decision(
            key=name,
            family="activation",
            rewrite="activation.recompute",
            cost=Cost(1e-3, temporary_bytes=1024),
            alternatives=[kept],
            reason="less to save",
        )

    policy = Policy(
        rewrite="activation.recompute", tensors=2, bytes=8192, waiting=2048, seconds=1.5e-3
    )
    memory = Memory(weights=0, border=1, holders={"kept": [1, 2]}, spans=[], policies=[policy])
    found = shown(site("a.0"), site("a.1"), workload=Train(1, 1), memory=memory)
    assert "saved for backward 8 KiB -> 2 KiB, time 0 s -> 2 ms" in found
    assert "minimising latency within these limits" in found
    assert "in all 2 ms; what several are made again from runs once" in " ".join(found.split())
    assert "the step takes 1.5 ms longer" in " ".join(found.split())
    assert "temporary" not in found
