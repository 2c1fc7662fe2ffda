"""Roofline by exact arithmetic; measured costs are kept on disk and not measured twice."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.cost_models import measured, sources
from fxopt.cost_models.hardware import Device
from fxopt.cost_models.measured import Measured, Point
from fxopt.cost_models.roofline import Roofline
from fxopt.cost_models.timing import Timing
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
    linked = replace(DEVICE, to_host=1e7, to_device=4e7)
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


def test_no_more_is_run_than_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, runs = [0.0], list[str]()
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])

    def timed(self: Measured, run, made: OpCall, prior: float) -> tuple[Timing, float]:
        runs.append(made.key)
        now[0] += 2.0
        return Timing(3 * prior), -1.0

    monkeypatch.setattr(Measured, "_time", timed)
    model = Measured(DEVICE, "float32", folder=tmp_path)
    model.left = 3.0
    for size in (1, 2, 3, 4):
        made = call(key=f"{size}", bytes_read=size * 1e6, family="f", run=lambda device: None)
        found = model(made)
        assert found.seconds == pytest.approx(3 * model.prior(made).seconds)
        assert (found.doubt > 0) == (size > 2)  # told by the others
    assert runs == ["1", "2"]
    assert model.measured == {"1", "2"}
    model.left = 1.0
    model(call(key="3", bytes_read=3e6, family="f", run=lambda device: None))
    assert runs == ["1", "2", "3"]


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


def test_a_product_of_few_rows_is_computed_at_the_rate_of_few_rows() -> None:
    model = Roofline(replace(DEVICE, few_rows_rate={"float32": 1e8}))
    weight = 4 * 1000 * 1000
    few = call(flops=2.0 * 4 * 1000 * 1000, weight_bytes=weight)
    many = call(flops=2.0 * 400 * 1000 * 1000, weight_bytes=weight)
    assert model(few).seconds == pytest.approx(8e6 / 1e8 + 1e-6)
    assert model(many).seconds == pytest.approx(8e8 / 1e9 + 1e-6)


def test_on_a_gpu_launches_are_those_of_a_graph_and_the_host_issues_beside_them() -> None:
    gpu = replace(DEVICE, kind="cuda", launch_seconds=8e-6, graph_seconds=1e-6)
    cost = Roofline(gpu)(call(bytes_read=1e6, launches=2))
    assert cost.seconds == pytest.approx(1e-3 + 2e-6)
    assert cost.host == pytest.approx(16e-6)
    assert Roofline(DEVICE)(call(bytes_read=1e6)).host == 0.0


def test_what_many_calls_share_is_divided(tmp_path: Path) -> None:
    model = Measured(DEVICE, "float32", folder=tmp_path)
    alone = model(call(key="a", run=lambda device: lambda: time.sleep(0.01))).seconds
    shared = model(call(key="b", share=4, run=lambda device: lambda: time.sleep(0.01))).seconds
    assert alone / 8 < shared < alone / 2


def test_another_source_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, runs = tmp_path / "kernels", []
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "op.py").write_text("a = 1")
    monkeypatch.setattr(sources, "kernels_folder", lambda: folder)
    mine = replace(call(run=lambda device: runs.append(1) or (lambda: None)), op="fxopt::mine")
    for text, count in (("a = 1", 1), ("a = 1", 1), ("a = 2", 2), ("a = 1", 2)):
        (folder / "mine" / "op.py").write_text(text)
        sources.digest.cache_clear()
        model = Measured(DEVICE, "float32", folder=tmp_path)
        model(mine)
        model.save()
        assert len(runs) == count
    sources.digest.cache_clear()


def test_between_two_runs_the_rest_of_the_model_is_read(tmp_path: Path) -> None:
    cached = replace(DEVICE, cache_bytes={"L1": 2**12, "L2": 2**20})
    read: list[int] = []
    timed: list[int] = []
    for working_set in (0, 3000, 4000, 2**30, 2**31):
        model = Measured(cached, "float32", folder=tmp_path, working_set=working_set)
        flush = model._flush
        model._flush = lambda m=model, f=flush: (f(), read.append(m._buffer.nbytes))[0]
        model(call(run=lambda device: timed.append(1) or (lambda: None)))
        model.save()
    # of 3000 and 4000 bytes what was measured is shared; more than fills the cache is not read
    assert len(timed) == 3
    assert set(read) == {4096, 3 * 2**19}


def family(model: Measured, excess: dict[float, float]) -> None:
    """Measured calls of one family: bytes -> seconds over what the roofline says."""
    for moved, factor in excess.items():
        made = call(key=f"{moved}", bytes_read=moved, family="f")
        prior = model.prior(made).seconds
        model._known[model._key(made)] = Point(0.0, moved, prior, factor * prior, 0.0)


def test_calls_between_measured_ones_are_told_by_them(tmp_path: Path) -> None:
    model = Measured(DEVICE, "float32", folder=tmp_path)
    family(model, {1e6: 3.0, 2e6: 3.0, 4e6: 3.0})
    asked = call(key="asked", bytes_read=3e6, family="f")
    found = model(asked)
    assert found.seconds == pytest.approx(3 * model.prior(asked).seconds)
    assert 0 < found.doubt < 0.3 * found.seconds
    assert "asked" not in model.measured
    other = model(call(key="asked", bytes_read=3e6, family="other"))
    assert (other.seconds, other.doubt) == (pytest.approx(0.009003), 0.0)


def test_what_was_not_timed_is_no_faster_for_it_than_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Measured(DEVICE, "float32", folder=tmp_path)
    unknown = call(key="int4", bytes_read=2e6, family="int4")
    assert model(unknown) == model.prior(unknown)
    monkeypatch.setattr(measured, "time_call", lambda *_, **__: Timing(seconds.pop(0), spread=0.9))
    seconds = [0.3, 0.004 * 30, 0.001]
    model(call(key="far", bytes_read=1e3, family="linear", run=lambda _: lambda: None))
    model(call(key="near", bytes_read=4e6, family="linear", run=lambda _: lambda: None))
    assert model(unknown).seconds == pytest.approx(30 * model.prior(unknown).seconds, rel=1e-3)
    # calls that are as near and were left alone say that the machine is not to blame
    model(call(key="near too", bytes_read=1e6, family="linear", run=lambda _: lambda: None))
    assert model(unknown) == model.prior(unknown)


def test_doubt_grows_with_distance_and_with_disagreement(tmp_path: Path) -> None:
    def doubt(excess: dict[float, float], moved: float) -> float:
        model = Measured(DEVICE, "float32", folder=tmp_path)
        family(model, excess)
        found = model(call(key="asked", bytes_read=moved, family="f"))
        return found.doubt / found.seconds

    alike, apart = {1e6: 2.0, 4e6: 2.0}, {1e6: 1.0, 4e6: 4.0}
    assert doubt(alike, 2e6) < doubt(apart, 2e6)
    assert doubt(alike, 4e6) < doubt(alike, 8e6) < doubt(alike, 64e6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 8.0), min_size=2, max_size=6), st.floats(5.0, 9.0))
def test_what_is_told_lies_within_what_was_measured(factors: list[float], power: float) -> None:
    model = Measured(DEVICE, "float32", folder=Path("/nonexistent"))
    family(model, {10.0 ** (5 + i): factor for i, factor in enumerate(factors)})
    asked = call(key="asked", bytes_read=10.0**power, family="f")
    ratio = model(asked).seconds / model.prior(asked).seconds
    assert min(factors) * (1 - 1e-9) <= ratio <= max(factors) * (1 + 1e-9)


def test_repeats_that_disagree_are_used_but_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measured, "time_call", lambda *_, **__: Timing(2e-6, spread=0.9))
    model = Measured(DEVICE, "float32", folder=tmp_path)
    assert model(call(run=lambda device: lambda: None)).seconds == 2e-6
    model.save()
    assert "disturbed by what else runs here: 1 op timing, used now" in caplog.text
    again = Measured(DEVICE, "float32", folder=tmp_path)
    again(call(run=lambda device: lambda: None))
    again.save()
    assert caplog.text.count("disturbed by what else runs") == 1
    assert model.disturbed == again.disturbed == {"k"}
    assert Measured(DEVICE, "float32", folder=tmp_path)._known == {}


def test_what_is_absurdly_slow_is_said_to_be_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measured, "time_call", lambda *_, **__: Timing(1.0, spread=0.0))
    model = Measured(DEVICE, "float32", folder=tmp_path)
    model(call(run=lambda device: lambda: None))
    model.save()
    assert model.disturbed == {"k"}
    assert "disturbed by what else runs here: 1 op timing, used now" in caplog.text
