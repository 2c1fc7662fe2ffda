from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.ir.budget import Budget, UnboundMetric


def accuracy(module: Any) -> float:
    return 0.9


@pytest.mark.parametrize(
    ("row", "value", "expected"),
    [
        ("latency", "12ms", 0.012),
        ("latency", "150 us", 150e-6),
        ("latency", "1.5s", 1.5),
        ("latency", 0.25, 0.25),
        ("weights", "8GiB", 8 << 30),
        ("memory", "500MB", 500e6),
        ("kv_cache", "1.5 kib", 1536),
        ("activations", 4096, 4096),
        ("weights", "1e6B", 1e6),
        ("kl", 0.02, 0.02),
        ("kl", "2e-2", 0.02),
        ("loss_increase", 0.5, 0.5),
        ("relative_error", 1e-3, 1e-3),
    ],
)
def test_absolute_limits(row: str, value: object, expected: float) -> None:
    budget = Budget(**{row: value})
    assert budget.absolute({}) == {row: pytest.approx(expected)}
    assert not budget.rows()[row].relative


@pytest.mark.parametrize(
    ("row", "value", "share"),
    [("latency", "0.7x", 0.7), ("kv_cache", "40%", 0.4), ("weights", "12.5 %", 0.125)],
)
def test_relative_limits_need_what_the_original_measures(
    row: str, value: str, share: float
) -> None:
    budget = Budget(**{row: value})
    assert budget.rows()[row].relative
    assert budget.absolute({row: 200.0}) == {row: pytest.approx(200 * share)}
    with pytest.raises(ValueError, match=rf"Budget.{row} is a share"):
        budget.absolute({"other": 1.0})


def test_latency_by_scenario() -> None:
    budget = Budget(latency={"prefill": "0.5x", "decode": "2ms"}, weights="1GB")
    assert list(budget.rows()) == ["latency.prefill", "latency.decode", "weights"]
    assert budget.absolute({"latency.prefill": 4.0}) == {
        "latency.prefill": 2.0,
        "latency.decode": 0.002,
        "weights": 1e9,
    }
    assert budget.cost_rows == ("latency", "weights")


@pytest.mark.parametrize(
    ("rows", "field", "says"),
    [
        ({"kv_cach": "40%"}, "kv_cach", "Did you mean 'kv_cache'?"),
        ({"kl": 0}, "kl", "budget of zero cannot be kept: every model takes"),
        ({"weights": "0GB"}, "weights", "budget of zero"),
        ({"latency": {"decode": "0x"}}, "latency", "budget of zero"),
        ({"kl": -1}, "kl", "negative"),
        ({"weights": "-3GB"}, "weights", "negative"),
        ({"kl": math.nan}, "kl", "not a finite number"),
        ({"weights": math.inf}, "weights", "not a finite number"),
        ({"latency": math.nan}, "latency", "not a finite number"),
        ({"latency": "40%"}, "latency", "'0.4x'"),
        ({"kv_cache": "0.4x"}, "kv_cache", "'40%'"),
        ({"kv_cache": 0.4}, "kv_cache", "'40%'"),
        ({"weights": "60"}, "weights", "no unit: write '60%' or '60B'"),
        ({"kv_cache": " 0.4 "}, "kv_cache", "no unit: write '40%' or '0.4B'"),
        ({"latency": "12"}, "latency", "no unit: write '12x', '12ms' or '12s'"),
        ({"latency": {"decode": "0.7"}}, "latency", "no unit: write '0.7x'"),
        ({"kl": "2%"}, "kl", "plain number"),
        ({"latency": "12 parsecs"}, "latency", "not a unit of time"),
        ({"latency": "8GB"}, "latency", "not a unit of time"),
        ({"weights": "12ms"}, "weights", "not a unit of size"),
        ({"weights": "much"}, "weights", "not a number"),
        ({"weights": True}, "weights", "not bool"),
        ({"weights": ["1GB"]}, "weights", "not list"),
        ({"latency": {}}, "latency", "empty"),
        ({"latency": {1: "1s"}}, "latency", "names of workloads"),
        ({"metric": 3, "metric_drop": 0.1}, "metric", "takes a function"),
        ({"kl": 0.1, "minimize": "speed"}, "minimize", "'latency', 'memory' or 'error'"),
        ({"kl": 0.1, "relative_error": 0.1}, "", "one quality row, not kl and relative_error"),
        ({"metric": accuracy}, "", "metric and metric_drop belong together"),
        ({"metric_drop": 0.1}, "", "metric and metric_drop belong together"),
        ({"minimize": "latency", "weights": "40%"}, "", "without a quality row"),
        ({}, "", "names no row"),
    ],
    ids=lambda v: str(v).partition(" at 0x")[0],
)
def test_mistakes_name_the_field_and_show_an_example(
    rows: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(ValueError, match="Budget") as caught:
        Budget(**rows)
    message = str(caught.value)
    assert says in message
    assert field in message
    assert "pydantic" not in message
    assert "=" in message.partition("Example:")[2] or not field or says.startswith("Did")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="Budget") as caught:
        Budget(kl="x", weights="y", speed=1)
    message = str(caught.value)
    assert all(field in message for field in ("Budget.kl", "Budget.weights", "'speed'"))


@pytest.mark.parametrize(
    ("rows", "objective"),
    [
        ({"kl": 0.1}, "latency"),
        ({"kl": 0.1, "weights": "40%"}, "latency"),
        ({"weights": "40%"}, "error"),
        ({"kl": 0.1, "minimize": "memory"}, "memory"),
        ({"kl": 0.1, "weights": "40%", "minimize": "error"}, "error"),
    ],
)
def test_objective(rows: dict[str, Any], objective: str) -> None:
    assert Budget(**rows).objective == objective


def test_metric_survives_a_file_by_name_only() -> None:
    budget = Budget(metric=accuracy, metric_drop=0.01)
    assert budget.quality == "metric_drop"
    assert budget.absolute({}) == {"metric_drop": 0.01}
    text = budget.model_dump_json()
    assert "hand it in again" in text
    read = Budget.model_validate_json(text)
    assert isinstance(read.metric, UnboundMetric)
    assert read.metric.name.endswith("test_budget.accuracy")
    with pytest.raises(ValueError, match=r"accuracy.*with_metric"):
        read.metric(None)
    assert read.with_metric(accuracy) == budget
    assert Budget.model_validate_json(read.model_dump_json()) == read


def test_frozen_and_short_to_read() -> None:
    budget = Budget(kl=0.02, kv_cache="40%")
    with pytest.raises(ValueError, match="frozen"):
        budget.kl = 1.0
    assert repr(budget) == "Budget(kv_cache='40%', kl=0.02)"


sizes = st.one_of(
    st.integers(1, 1 << 50),
    st.integers(1, 10**6).map(lambda n: f"{n}MiB"),
    st.floats(0.1, 1000).map(lambda p: f"{p:.3f}%"),
)


@given(st.dictionaries(st.sampled_from(["weights", "memory", "kv_cache"]), sizes, min_size=1))
def test_json_round_trip(rows: dict[str, Any]) -> None:
    budget = Budget(kl=0.1, **rows)
    read = Budget.model_validate_json(budget.model_dump_json())
    assert read == budget
    assert read.rows() == budget.rows()
