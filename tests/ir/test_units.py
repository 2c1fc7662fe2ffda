from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.ir.units import format_value, parse_bytes, parse_seconds, so_many


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "-"),
        (0.0, "s", "0 s"),
        (1.5, "s", "1.5 s"),
        (0.0123456, "s", "12.3 ms"),
        (5e-6, "s", "5 µs"),
        (0.99996e-3, "s", "1 ms"),
        (0.99996 * 2**20, "bytes", "1 MiB"),
        (0, "bytes", "0 B"),
        (1023, "bytes", "1023 B"),
        (1536, "bytes", "1.5 KiB"),
        (-1536, "bytes", "-1.5 KiB"),
        (500 << 20, "bytes", "500 MiB"),
        (8 << 30, "bytes", "8 GiB"),
        (0.02, "nats", "0.02 nats"),
        (0.012345, "", "0.0123"),
        (math.inf, "s", "inf"),
        (-math.inf, "", "-inf"),
        (math.nan, "bytes", "nan"),
    ],
)
def test_format(value: float | None, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 sites"), (1, "1 site"), (2, "2 sites")])
def test_counts(count: int, text: str) -> None:
    assert so_many(count, "site") == text


@given(st.floats(1e-9, 1e6))
def test_what_is_shown_reads_back_to_three_digits(value: float) -> None:
    assert parse_seconds(format_value(value, "s")).value == pytest.approx(value, rel=6e-3)
    size = 1 + value * 1e6
    assert parse_bytes(format_value(size, "bytes")).value == pytest.approx(size, rel=6e-3, abs=0.6)


@pytest.mark.parametrize(
    ("text", "value"), [("1kB", 1e3), ("1KiB", 1024), ("2 b", 2), (".5mb", 5e5)]
)
def test_sizes(text: str, value: float) -> None:
    assert parse_bytes(text).value == value


def test_numbers_are_bytes_and_seconds_where_texts_need_a_unit() -> None:
    assert parse_bytes(60).value == 60
    assert parse_seconds(0.5).value == 0.5
    for parse in (parse_bytes, parse_seconds):
        with pytest.raises(ValueError, match="no unit"):
            parse("60")
