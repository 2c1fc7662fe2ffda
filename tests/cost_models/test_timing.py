"""Clocks that only calls move; on a GPU, device and host apart."""

from __future__ import annotations

import time

import pytest
import torch

from fxopt.cost_models import timing
from fxopt.cost_models.timing import time_call, time_calls

CPU = torch.device("cpu")


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only calls move."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    return clock


def test_a_disturbed_timing_is_tried_until_a_run_was_left_alone(hands: list[float]) -> None:
    spent = [0.012] * 20 + [0.00004] + [0.012] * 40

    def call() -> None:
        hands[0] += spent.pop(0)

    found = time_call(call, CPU, seconds=0.05, expected=0.00002)
    assert found.seconds == pytest.approx(0.00004)


def test_what_takes_as_long_as_expected_is_not_tried_again(hands: list[float]) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        hands[0] += 0.01

    found = time_call(call, CPU, seconds=0.1, expected=0.004)
    assert found.seconds == pytest.approx(0.01)
    assert found.spread == pytest.approx(0.0)
    assert found.host == 0.0
    assert len(calls) <= 12


def test_repeats_that_disagree_are_made_again(hands: list[float]) -> None:
    spent = [0.01] + [0.01, 0.03] * 3 + [0.02] * 20

    def call() -> None:
        hands[0] += spent.pop(0)

    found = time_call(call, CPU, seconds=0.05)
    assert found.seconds == pytest.approx(0.02)
    assert not found.disturbed


@pytest.mark.parametrize(("each", "times"), [(0.001, 51), (0.02, 6), (0.2, 3)])
def test_long_calls_are_repeated_less(hands: list[float], each: float, times: int) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        hands[0] += each

    assert time_call(call, CPU, seconds=0.05).seconds == pytest.approx(each)
    assert abs(len(calls) - times) <= 1  # rounding of sums of seconds


def test_what_never_agrees_is_said_to_be_disturbed(hands: list[float]) -> None:
    spent = [0.01, 0.03] * 100

    def call() -> None:
        hands[0] += spent.pop(0)

    assert time_call(call, CPU, seconds=0.05).disturbed


def test_what_comes_before_is_not_timed(hands: list[float]) -> None:
    def before() -> None:
        hands[0] += 1.0

    def call() -> None:
        hands[0] += 0.01

    assert time_call(call, CPU, seconds=0.05, before=before).seconds == pytest.approx(0.01)


@pytest.mark.gpu
def test_on_a_gpu_the_device_and_the_host_are_told_apart() -> None:
    small, large = torch.ones(8, device="cuda"), torch.ones(2**28, device="cuda")
    launch = time_calls([lambda: small + small] * 32)
    copied = time_calls([lambda: large.clone()] * 4)
    assert launch.seconds < launch.host < 1e-3
    assert copied.seconds > 5 * copied.host


@pytest.mark.gpu
def test_on_a_gpu_what_waits_for_the_device_is_timed_without_a_graph() -> None:
    small = torch.ones(8, device="cuda")
    waits = time_calls([lambda: (small + small).sum().item()] * 8)
    assert waits.seconds > 0
    began = time.perf_counter()
    assert (small + 1).sum().item() == 16.0
    assert time.perf_counter() - began < 1
