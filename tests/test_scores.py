"""What was scored once is not scored again: other budgets, interrupted runs, later processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import measure as measure_module
from fxopt.decide import runs
from fxopt.decide.priors import Priors
from fxopt.decide.quality import Reference
from fxopt.decide.runs import Latency


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96)).eval()


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 20, 96, generator=generator) for _ in range(6)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The candidates whose error was estimated, in order."""
    seen: list[Any] = []
    estimate = Priors.__call__

    def counted(self: Priors, proposal: Any) -> float:
        seen.append(proposal.candidate.label)
        return estimate(self, proposal)

    monkeypatch.setattr(Priors, "__call__", counted)
    return seen


BUDGET = fxopt.Budget(weights="60%", relative_error=0.2)


def test_other_data_to_choose_by_is_scored_anew(
    model: nn.Module, data: list[torch.Tensor], scored: list[Any]
) -> None:
    """Of six sequences the fourth is the second to choose by, on which sites are measured too."""
    fxopt.plan(model, BUDGET, data[0], calibration=data)
    count = len(scored)
    changed = [*data[:3], 2 * data[3], *data[4:]]
    fxopt.plan(model, BUDGET, data[0], calibration=changed)
    assert len(scored) == 2 * count


def test_a_second_budget_scores_nothing_and_decides_alike(
    model: nn.Module, data: list[torch.Tensor], scored: list[Any]
) -> None:
    first = fxopt.plan(model, BUDGET, data[0], calibration=data)
    count = len(scored)
    assert count > 10
    other = fxopt.plan(
        model, fxopt.Budget(weights="30%", relative_error=0.2), data[0], calibration=data
    )
    again = fxopt.plan(model, BUDGET, data[0], calibration=data)
    assert len(scored) == count
    assert not first.diff(again)
    assert first.diff(other)


def test_whole_choices_are_measured_once(
    model: nn.Module, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, measured = Reference.measure, list[Any]()

    def counted(self: Reference, *args: Any, **options: Any) -> Any:
        measured.append(args)
        return measure(self, *args, **options)

    monkeypatch.setattr(Reference, "measure", counted)
    first = fxopt.plan(model, BUDGET, data[0], calibration=data)
    assert first.trials
    assert measured
    measured.clear()
    again = fxopt.plan(model, BUDGET, data[0], calibration=data)
    assert not measured
    assert not first.diff(again)
    assert again.totals[1].predicted == first.totals[1].predicted
    data[3] = data[3] + 0.01  # whole choices are measured on it, single sites are not
    fxopt.plan(model, BUDGET, data[0], calibration=data)
    assert len(measured) >= len(first.trials)


@pytest.mark.parametrize("seconds", [1e-9, 10.0])
def test_a_machine_that_is_busy_meanwhile_decides_alike(
    model: nn.Module, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """What the whole model takes is measured each time: it is reported, and weighs nothing."""
    first = fxopt.plan(model, BUDGET, data[0], calibration=data)
    measure = measure_module.measure_latency

    def disturbed(*args: Any, **options: Any) -> Latency:
        found = measure(*args, **options)
        return replace(found, before=seconds, after=seconds * found.after / found.before)

    monkeypatch.setattr(measure_module, "measure_latency", disturbed)
    again = fxopt.plan(model, BUDGET, data[0], calibration=data)
    assert again.baseline["latency"] == pytest.approx(seconds)
    assert not first.diff(again)


@pytest.mark.parametrize("change", ["weights", "calibration", "quality", "seed"])
def test_other_models_data_and_measures_are_scored(
    model: nn.Module, data: list[torch.Tensor], scored: list[Any], change: str
) -> None:
    fxopt.plan(model, BUDGET, data[0], calibration=data)
    count, budget, options = len(scored), BUDGET, {}
    if change == "weights":
        with torch.no_grad():
            model[0].weight.mul_(1.01)
    elif change == "calibration":
        data[0] = data[0] + 0.01
    elif change == "quality":
        budget = fxopt.Budget(weights="60%")
        budget = fxopt.Budget(metric=lambda _: 1.0, metric_drop=0.1, weights="60%")
    else:
        options["seed"] = 1
    fxopt.plan(model, budget, data[0], calibration=data, **options)
    assert len(scored) == 2 * count


def test_an_interrupted_scoring_goes_on_where_it_stopped(
    model: nn.Module, data: list[torch.Tensor], scored: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Priors.__call__

    def interrupted(self: Priors, proposal: Any) -> float:
        if len(scored) == 7:
            raise KeyboardInterrupt
        return counted(self, proposal)

    monkeypatch.setattr(Priors, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxopt.plan(model, BUDGET, data[0], calibration=data)
    monkeypatch.setattr(Priors, "__call__", counted)
    fxopt.plan(model, BUDGET, data[0], calibration=data)
    whole = len(scored)
    scored.clear()
    data[0] = data[0] + 1.0  # nothing is known of these
    fxopt.plan(model, BUDGET, data[0], calibration=data)
    assert len(scored) == whole


def test_a_damaged_file_is_no_obstacle(
    model: nn.Module, data: list[torch.Tensor], folder: Path
) -> None:
    first = fxopt.plan(model, BUDGET, data[0], calibration=data)
    for file in folder.glob("scores-*.json"):
        file.write_text("{ cut")
    assert not first.diff(fxopt.plan(model, BUDGET, data[0], calibration=data))


def test_what_is_measured_alone_has_its_interval_the_second_time_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (3, 48))

    def planned() -> fxopt.Plan:
        return fxopt.plan(
            model, fxopt.Budget(weights="75%"), {"input_ids": ids}, rewrites=["linear.quantized"]
        )

    first, again = planned(), planned()
    options = [one for d in first.decisions for one in (d, *d.alternatives)]
    measured = [one for one in options if one.error_measured]
    assert measured
    assert all(one.error_within is not None and one.error_within > 0 for one in measured)
    assert all(one.error_within is None for one in options if not one.error_measured)
    taken = next(d for d in first.rewritten if d.error_measured)
    text = first.explain(taken.key)
    assert f"error {taken.error:.3g} ± {taken.error_within:.2g}, measured alone" in text
    assert [d.error_within for d in again.decisions] == [d.error_within for d in first.decisions]


@pytest.mark.parametrize(("limited", "share"), [(False, 0.25), (True, 1.0)])
def test_seconds_of_the_whole_that_no_row_limits_are_measured_briefly(
    model: nn.Module,
    data: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    limited: bool,
    share: float,
) -> None:
    measure, asked = measure_module.measure_latency, list[float]()

    def timed(*args: Any, **options: Any) -> Latency:
        asked.append(options["seconds"])
        return measure(*args, **options)

    monkeypatch.setattr(measure_module, "measure_latency", timed)
    rows: Any = {"latency": "9x"} if limited else {}
    budget = fxopt.Budget(weights="60%", relative_error=0.2, **rows)
    fxopt.plan(model, budget, data[0], calibration=data)
    assert set(asked) == {share * runs.SECONDS}
