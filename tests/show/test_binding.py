"""What is said to bind does, and what more of it would buy is what was found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Looser, Price
from fxopt.ir.plan import Plan
from fxopt.show import binding
from tests.show.synthetic import PRICED, llama


def looser(row: str, limit: float, latency: float) -> Looser:
    rows = [RowResult("latency", None, latency, None, "s", before=1.0)]
    return Looser(row=row, limit=limit, unit="bytes", rows=rows)


def unsolved(row: str) -> Looser:
    return Looser(row=row, limit=1.0, unit="bytes", rows=[], solved=False)


def priced(weights: float, kl: float, outlooks: list[Looser] | None = None) -> Plan:
    plan = llama(1, 1)
    rows = {"weights": ("bytes", weights, 0.98), "kl": ("nats", kl, 0.97)}
    plan.prices = [
        Price(row=name, unit=unit, price=price, used=used, **PRICED)
        for name, (unit, price, used) in rows.items()
    ]
    plan.looser = outlooks or []
    return plan


@pytest.mark.parametrize(
    ("outlooks", "bound", "sentence"),
    [
        ([], ["weights"], "weights binds, 99.5% of its limit used"),
        ([looser("weights", 7e9, 0.8)], ["weights"], "latency would fall by up to 20%"),
        ([looser("kl", 7e9, 0.8)], ["kl", "weights"], "kl binds, 55.0%"),
        ([looser("weights", 7e9, 1.0), looser("kl", 1, 1.0)], [], "more of any row buys nothing"),
        ([looser("weights", 7e9, 0.997), looser("kl", 1, 1.0)], [], "buys next to nothing"),
        ([looser("kl", 1, 0.9), looser("weights", 1, 0.7)], ["weights", "kl"], "; kl binds"),
        ([looser("kl", 1, 1.0), unsolved("weights")], ["weights"], "weights binds, 99.5%"),
    ],
)
def test_without_prices_it_is_what_more_buys_and_what_is_full(
    outlooks: list[Looser], bound: list[str], sentence: str
) -> None:
    plan = llama(1, 1)
    plan.prices, plan.looser = [], outlooks
    assert binding.binding(plan) == bound
    assert sentence in binding.sentence(plan)


def test_rows_with_room_do_not_bind() -> None:
    plan = llama(1, 1)
    plan.prices, plan.looser, plan.totals = [], [], plan.totals[1:]
    assert binding.binding(plan) == []
    assert "every row has room left" in binding.sentence(plan)


def test_by_its_price_a_row_binds_whatever_was_not_solved() -> None:
    plan = priced(1e-10, 0.0, [unsolved("weights"), looser("kl", 1, 1.0)])
    assert binding.binding(plan) == ["weights"]
    said = binding.sentence(plan)
    assert said.startswith("weights binds, 99.5% of its limit used: ")
    assert said.endswith("Not binding: kl uses 55%, more of it buys nothing.")
    plan = priced(1e-10, 0.0, [unsolved("weights"), looser("kl", 1, 0.998)])
    assert binding.sentence(plan).endswith("kl uses 55%, more of it buys next to nothing.")


def test_a_row_that_was_proved_to_buy_nothing_does_not_bind() -> None:
    assert binding.binding(priced(1e-10, 1.0, [looser("kl", 1, 1.0)])) == ["weights"]
    assert binding.binding(priced(1e-10, 1.0, [unsolved("kl")])) == ["weights", "kl"]


def test_a_prediction_that_the_measurement_did_not_meet_is_told() -> None:
    said = binding.sentence(priced(0.0, 5.0))
    assert "kl binds, 55.0% of its limit used (97.0% as the solver predicted it)" in said


@pytest.mark.parametrize(
    ("limit", "price", "expected"),
    [
        (8 * 2**30, 8e-3 / 2**30, "200 MiB more would buy about 1.56 ms"),
        (20 * 2**30, 8e-3 / 2**30, "1 GiB more would buy about 8 ms"),
        (3 * 2**20, 1e-9, "100 KiB more would buy about 102 µs"),
        (700.0, 1e-3, "20 B more would buy about 20 ms"),
    ],
)
def test_prices_are_quoted_for_round_amounts(limit: float, price: float, expected: str) -> None:
    plan = priced(price, 0.0)
    plan.totals[0] = replace(plan.totals[0], limit=limit)
    assert binding.quote(plan, "weights") == expected
    assert binding.quote(plan, "kl") == ""


def test_a_row_that_could_not_be_kept_is_what_is_said() -> None:
    plan = priced(1e-10, 0.0)
    plan.totals[1] = replace(plan.totals[1], measured=0.03)
    assert binding.sentence(plan) == "kl could not be kept: no plan was found that holds."
