"""Parametrisations of which a part runs by default and all in CI."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of values; those that differ from the first in more than one are slow."""
    values = [list(axis) for axis in axes]
    found: list[Any] = []
    for places in itertools.product(*(range(len(axis)) for axis in values)):
        chosen = (axis[i] for axis, i in zip(values, places, strict=True))
        found.append(_marked(*chosen, slow=sum(map(bool, places)) > 1))
    return found


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """All values of one argument; those behind the first `count` are slow."""
    return [_marked(value, slow=i >= count) for i, value in enumerate(values)]


def _marked(*values: Any, slow: bool) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])
