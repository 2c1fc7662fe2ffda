"""Roofline by exact arithmetic; measured costs are kept on disk and not measured twice."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxopt.cost_models import hardware
from fxopt.cost_models.hardware import Device, probe
from fxopt.cost_models.measured import Measured
from fxopt.cost_models.roofline import Roofline
from fxopt.ir.cost import Cost, OpCall

pytestmark = pytest.mark.usefixtures("clock")

DEVICE = Device("toy", "cpu", 1e9, {"float32": 1e9, "bfloat16": 2e9}, 1e-6, 2**30, 1, "2026-01-01")


def call(**values) -> OpCall:
    given = {"flops": 0.0, "bytes_read": 0.0, "bytes_written": 0.0, **values}
    return OpCall("toy", values.pop("key", "k"), **{k: v for k, v in given.items() if k != "key"})


def test_roofline_takes_the_slower_of_arithmetic_and_traffic() -> None:
    model = Roofline(DEVICE)
    assert model(call(flops=5e9, bytes_read=1e9)).seconds == pytest.approx(5 + 1e-6)
    assert model(call(flops=1e9, bytes_read=3e9, bytes_written=1e9)).seconds == pytest.approx(
        4 + 1e-6
    )
    assert Roofline(DEVICE, "bfloat16")(call(flops=4e9)).seconds == pytest.approx(2 + 1e-6)
    assert Roofline(DEVICE, "int3")(call(flops=1e9)).seconds == pytest.approx(1 + 1e-6)


def test_what_crosses_to_the_host_takes_the_link() -> None:
    linked = replace(DEVICE, host_link=1e7)
    assert Roofline(linked)(call(bytes_read=1e9, host_bytes=1e9)).seconds == pytest.approx(
        100 + 1e-6
    )
    assert Roofline(DEVICE)(call(host_bytes=3e9)).seconds == pytest.approx(3 + 1e-6)


def test_costs_add() -> None:
    total = Cost(1.0, 2, 3, 4) + Cost(0.5, 1, 1, 9)
    assert total == Cost(1.5, 3, 4, 9)


def test_a_call_is_measured_once_and_kept_on_disk(tmp_path: Path) -> None:
    runs = []

    def make(device: torch.device):
        runs.append(device)
        return lambda: None

    first = Measured(DEVICE, "float32", folder=tmp_path)
    timed = first(call(run=make))
    assert first(call(run=make)) == timed
    first.save()
    again = Measured(DEVICE, "float32", folder=tmp_path)
    assert again(call(run=make)) == timed
    assert len(runs) == 1


def test_a_call_that_would_take_long_stays_a_prediction(tmp_path: Path) -> None:
    model = Measured(DEVICE, "float32", folder=tmp_path, limit=0.5)
    slow = call(flops=1e9, run=lambda device: pytest.fail("was run"))
    assert model(slow).seconds == pytest.approx(1 + 1e-6)


def test_what_cannot_be_is_measured_again_by_the_next_process(tmp_path: Path) -> None:
    runs: list[int] = []

    def make(device: torch.device):
        runs.append(1)
        return lambda: time.sleep(0.01)

    first = Measured(DEVICE, "float32", folder=tmp_path)
    assert first(call(run=make)).seconds >= 0.01  # of a call that moves nothing
    assert first(call(run=make)).seconds >= 0.01
    first.save()
    Measured(DEVICE, "float32", folder=tmp_path)(call(run=make))
    assert len(runs) == 2


def test_a_damaged_cache_file_is_ignored(tmp_path: Path) -> None:
    model = Measured(DEVICE, "float32", folder=tmp_path)
    model(call(run=lambda device: lambda: None))
    model.save()
    (file,) = tmp_path.iterdir()
    file.write_text("{ nonsense")
    assert Measured(DEVICE, "float32", folder=tmp_path)(call(flops=1e9)).seconds > 1


def test_probe_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    first = probe("cpu")
    assert first.bandwidth > 0
    assert set(first.matmul_rate) == {"float32", "bfloat16", "float16"}
    assert probe("cpu") == first


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only calls move."""
    clock = [0.0]
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    return clock


def test_a_disturbed_timing_is_tried_until_a_run_was_left_alone(hands: list[float]) -> None:
    spent = [0.012] * 20 + [0.00004] + [0.012] * 40

    def call() -> None:
        hands[0] += spent.pop(0)

    device = torch.device("cpu")
    found = hardware.time_call(call, device, seconds=0.05, expected=0.00002)
    assert found == pytest.approx(0.00004)


def test_what_takes_as_long_as_expected_is_not_tried_again(hands: list[float]) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        hands[0] += 0.01

    found = hardware.time_call(call, torch.device("cpu"), seconds=0.1, expected=0.004)
    assert found == pytest.approx(0.01)
    assert len(calls) <= 12
