from __future__ import annotations

import pytest

from fxopt.ir.errors import PlanError
from fxopt.ir.names import covers, hint, select

NAMES = ["model.layers.1.fc", "model.layers.10.fc", "model.attn/kv=0", "model.attn#1/kv=0"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.1", NAMES[:1]),
        ("model.layers.1.fc", NAMES[:1]),
        ("model.attn", NAMES[2:]),
        ("model.attn#1", NAMES[3:]),
        ("model", NAMES),
        (r"re:.*\.fc", NAMES[:2]),
        (["model.attn#1", "model.layers.10"], [NAMES[1], NAMES[3]]),
        ([], []),
    ],
    ids=str,
)
def test_select(pattern: str | list[str], expected: list[str]) -> None:
    assert select(pattern, NAMES) == expected


@pytest.mark.parametrize("pattern", ["model.layers.1.f", "model.lay", "re:fc", "fc", ""])
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(PlanError, match="no site matches"):
        select(["model", pattern], NAMES, "site")


def test_an_expression_covers_whole_names_only() -> None:
    assert not covers("re:model", "model.layers")
    assert covers("re:model.*", "model.layers")


def test_a_part_of_names_is_answered_with_an_expression_that_covers_them() -> None:
    with pytest.raises(PlanError) as caught:
        select("fc", NAMES, "site")
    text = str(caught.value)
    assert text.endswith("mean 're:.*fc.*': model.layers.1.fc, model.layers.10.fc?")
    assert select("re:.*fc.*", NAMES) == NAMES[:2]


def test_hint() -> None:
    assert hint("model.layer.1.fc", NAMES).startswith(" Did you mean 'model.layers.1.fc'")
    assert hint("zzz", NAMES) == ""
