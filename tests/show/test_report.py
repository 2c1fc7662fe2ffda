from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fxopt.ir.errors import RowResult
from fxopt.show import report
from fxopt.show.report import Report
from fxopt.show.rows import deviation, verdict

KL = RowResult("kl", 0.02, 0.010, 0.015, "nats")
CACHE = RowResult("kv_cache", 1 << 20, 1 << 20, 1 << 20, "bytes", before=4 << 20)
WEIGHTS = RowResult("weights", None, 3e6, 3.3e6, "bytes", before=9e6)
SLOW = RowResult("latency", 0.5, 0.4, 0.6, "s", before=0.7)


def test_golden(golden: Callable[[str, str], None]) -> None:
    made = Report([KL, CACHE, WEIGHTS, SLOW], ["p99 of kl is 0.2 nats"], {"kv_cache": "25%"})
    golden("report.txt", report.render(made, colours=False))


def test_plain_when_printed_to_a_file() -> None:
    made = Report([KL])
    assert str(made) == report.render(made, colours=False)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([], True),
        ([KL, CACHE, WEIGHTS], True),
        ([KL, SLOW], False),
        ([RowResult("kl", 0.02, 0.01, None, "nats")], False),
        ([RowResult("kl", 0.0, None, 0.0, "nats")], True),
        ([RowResult("kl", 0.02, 0.01, float("inf"), "nats")], False),
    ],
)
def test_kept_means_measured_and_within_every_limit(rows: list[RowResult], kept: bool) -> None:
    assert Report(rows).kept is kept


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (WEIGHTS, ""),
        (CACHE, "holds"),
        (SLOW, "exceeded by 20.0%"),
        (RowResult("kl", 0.02, None, 0.4, "nats"), "exceeded: 20x its limit"),
        (RowResult("kl", 0.0, None, 0.4, "nats"), "exceeded"),
        (RowResult("kl", 0.02, None, None, "nats"), "not measured"),
        (RowResult("kl", 0.02, 0.02, None, "nats"), "not measured"),
        (RowResult("kl", 0.02, 0.03, None, "nats"), "not measured, predicted to exceed"),
    ],
)
def test_verdict(row: RowResult, says: str) -> None:
    assert verdict(row) == says


def test_shares_of_next_to_nothing_are_not_told() -> None:
    def off(predicted: float, measured: float | None) -> str:
        return deviation(RowResult("kl", 1.0, predicted, measured, "nats"))

    assert [off(0.02, 0.03), off(0.02, 0.01)] == ["+50%", "-50%"]
    assert [off(1e-9, 0.02), off(0.02, 1e-9), off(0.02, -0.01)] == ["-"] * 3
    assert [off(0.0, 0.02), off(0.02, None)] == ["", ""]


def test_the_ratio_of_latency_stands_first_where_it_was_measured() -> None:
    first = str(Report([KL, SLOW])).splitlines()[0]
    assert first == "Measured latency: 0.86x of the original's, 600 ms against 700 ms"
    assert "Measured latency" not in str(Report([KL, replace(SLOW, measured=None)]))


def test_no_rows() -> None:
    assert "limit" in str(Report([]))
