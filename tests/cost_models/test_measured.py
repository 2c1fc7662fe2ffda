"""Roofline by exact arithmetic; measured costs are kept on disk and not measured twice."""

from __future__ import annotations

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


def test_a_disturbed_timing_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work slows all runs of a window but one."""
    clock, spent = [0.0], [0.010] * 6 + [0.001] + [0.010] * 5 + [0.001] * 300
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += spent.pop(0)

    assert hardware.time_call(call, torch.device("cpu"), seconds=0.1) == pytest.approx(0.001)


def test_a_quiet_timing_takes_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        calls.append(1)
        clock[0] += 0.01

    assert hardware.time_call(call, torch.device("cpu"), seconds=0.1) == pytest.approx(0.01)
    assert len(calls) <= 12
