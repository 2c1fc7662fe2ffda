"""Bytes alive: what is counted against the unchanged step is what a walk over all calls finds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.training.forms import again, images
from fxopt.training.holders import held
from fxopt.training.schedule import Schedule, schedule
from tests.crossed import first
from tests.training.test_images import at_random, saved_of, taken_apart

Example = tuple[nn.Module, dict[str, Any]]


def walked(laid: Schedule) -> list[float]:
    """Most bytes alive at each node: of the calls before it and its own, each looked at alone."""
    total = sum(held(laid).values())
    ends = [i for i, item in enumerate(laid.items) if item.kind == "run"]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [max(total[start : end + 1]) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("seed", first(range(3)))
def test_counted_as_walked(example: Example, seed: int) -> None:
    step = taken_apart(example)
    saved = saved_of(step)
    random.seed(seed)
    torch.manual_seed(seed)
    kinds: set[str] = set()
    for stops in ((), (), random.sample(list(saved.others.values()), 3)):
        choices = at_random(saved)
        laid = schedule(step, again(choices), stops, images(choices))
        kinds |= {item.kind for item in laid.items}
        assert laid.live().tolist() == walked(laid)
    assert {"again", "pack"} <= kinds


def test_an_unchanged_step(example: Example) -> None:
    laid = schedule(taken_apart(example), ())
    assert laid.live().tolist() == walked(laid)
    assert not laid.extras
