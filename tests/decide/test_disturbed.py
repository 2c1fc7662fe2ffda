"""Timings that other processes disturbed are said to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from fxopt.decide import verify
from fxopt.decide.disturbed import Spread, notes

CPU = torch.device("cpu")


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only calls move."""
    clock = [0.0]
    monkeypatch.setattr(verify.time, "perf_counter", lambda: clock[0])
    return clock


def taking(hands: list[float], times: list[float]) -> Callable[[], None]:
    """A call that takes these times in turn, again and again."""
    count = 0

    def call() -> None:
        nonlocal count
        hands[0] += times[count % len(times)]
        count += 1

    return call


def test_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(2.0, 4.0, 5)
    assert Spread.of([1.0] * 8 + [100.0] * 2).ratio == 1.0
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 1)
    assert Spread.of([0.0, 0.0]).ratio == 1.0
    assert Spread(2.0, 4.0, 5).per(4) == Spread(0.5, 1.0, 5)


def test_runs_that_differ_are_told_with_their_numbers(hands: list[float]) -> None:
    quiet, loud = taking(hands, [0.010]), taking(hands, [0.010, 0.025])
    steady = verify.compare(quiet, quiet, CPU, seconds=0.4)
    assert notes({"prefill": steady.spreads}) == []
    varied = verify.compare(quiet, loud, CPU, seconds=0.4)
    (note,) = notes({"prefill": steady.spreads, "decode": varied.per(5).spreads})
    assert "prefill" not in note
    runs = varied.spreads[0].runs
    assert f"half of {runs} runs of decode took 2 ms to 2 ms in the original" in note
    assert "and 2 ms to 5 ms in the result" in note
    assert note.startswith("latency: ")


def test_one_run_in_many_is_no_disturbance(hands: list[float]) -> None:
    call = taking(hands, [0.010] * 9 + [0.2])
    assert notes({"forward": verify.compare(call, call, CPU, seconds=1.0).spreads}) == []


def test_op_calls_that_varied_are_counted() -> None:
    (note,) = notes({}, 2, 3)
    assert "other processes: 2 of 3 op calls; measure" in note
    times = Spread(1.0, 2.0, 9), Spread(1.0, 1.0, 9)
    (note,) = notes({"decode": times}, 2, 3)
    assert "in the result; 2 of 3 op calls too; measure" in note
    assert notes({}, 1, 4) == []
    assert notes({}, 0, 0) == []


@pytest.mark.parametrize("loud", [False, True])
def test_the_report_says_so(loud: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = Spread(0.010, 0.030 if loud else 0.011, 7)
    monkeypatch.setattr(Spread, "of", classmethod(lambda cls, times: spread))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    data = [torch.randn(1, 8, 32) for _ in range(3)]
    budget = fxopt.Budget(relative_error=0.5, latency="100x")
    opt = fxopt.optimize(model, budget, data[0], calibration=data, rewrites=["linear.quantized"])
    said = [note for note in opt.report.notes if "disturbed" in note]
    assert len(said) == loud
    assert said == [note for note in opt.plan.notes if "disturbed" in note]
    if loud:
        assert "half of 7 runs of forward took 10 ms to 30 ms" in said[0]
    # measured again, what is said is of the timings of now
    quiet = Spread(0.010, 0.011, 7)
    monkeypatch.setattr(Spread, "of", classmethod(lambda cls, times: quiet))
    assert not any("disturbed" in note for note in fxopt.verify(opt, model, data).notes)
    monkeypatch.setattr(Spread, "of", classmethod(lambda cls, times: spread))
    inputs = {"input": torch.randn(4, 8, 32)}
    trained = fxopt.optimize(
        model, fxopt.Budget(activations="110%"), inputs, workload=fxopt.Train(batch=4, seq=8)
    )
    assert any("runs of the step took" in note for note in trained.report.notes) == loud
