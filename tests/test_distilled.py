"""`recover=fxopt.Distill(...)` from the call to the saved folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import cli, session
from fxopt.compiler import Compiler
from fxopt.decide import distill
from fxopt.distilled import Distillation
from fxopt.ir.errors import FxoptError
from fxopt.request import resolve

HOW = fxopt.Distill(steps=60)


class Mlp(nn.Module):
    """Half of the hidden channels are loud, of full rank, and read by nobody; what the others hold
    has rank 16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 192), nn.Linear(192, 64)
        with torch.no_grad():
            self.up.weight[:96] = torch.randn(96, 16) @ torch.randn(16, 64) / 32
            self.up.weight[96:] = torch.randn(96, 64) / 16
            self.down.weight[:, 96:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Mlp(), Mlp()).eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 63, 64, generator=generator) for _ in range(24)]


def optimized(model: nn.Module, data: list[Tensor], **options: Any) -> Any:
    given: dict[str, Any] = {
        "budget": fxopt.Budget(weights="80%"),
        "rewrites": ["linear.low_rank"],
        "keep": ["0.down", "1.down"],
        "calibration": data,
        "recover": HOW,
        **options,
    }
    return fxopt.optimize(model, given.pop("budget"), data[0], **given)


@pytest.fixture(scope="module")
def opt(model: nn.Module, data: list[Tensor]) -> Any:
    return optimized(model, data)


def error(opt: Any) -> float:
    return next(row.measured for row in opt.report.rows if row.name == "relative_error")


def test_errors_fall_and_the_report_says_where(
    model: nn.Module, data: list[Tensor], opt: Any
) -> None:
    plain = optimized(model, data, recover=None)
    assert error(opt) < 0.8 * error(plain)
    assert opt.plan.recover == HOW
    assert [block.block for block in opt.report.distilled] == ["0", "1"]
    assert all(block.after < block.before for block in opt.report.distilled)
    text = str(opt.report)
    assert "distilled  error before" in text
    for block in opt.report.distilled:
        assert f"{block.before:.3g}" in text
        assert f"{block.after:.3g}" in text
    assert "recover: 2 of 2 blocks are better on sequences held out" in text
    assert plain.plan.recover is None
    assert not plain.report.distilled
    assert "distilled" not in str(plain.report)
    with torch.no_grad():
        off = torch.cat([opt(x) - model(x) for x in data[16:]]).square().sum()
        whole = torch.cat([model(x) for x in data[16:]]).square().sum()
    assert error(opt) == pytest.approx(float((off / whole).sqrt()), rel=0.02)


def test_replayed_and_loaded_bit_for_bit(
    model: nn.Module, data: list[Tensor], opt: Any, tmp_path: Path
) -> None:
    opt.plan.save(tmp_path / "plan.json")
    plan = fxopt.Plan.load(tmp_path / "plan.json")
    assert plan.recover == HOW
    assert plan.distilled == opt.plan.distilled
    opt.save(tmp_path / "out")
    for again in (
        fxopt.apply(model, plan, example_inputs=data[0]),
        fxopt.load(tmp_path / "out"),
        optimized(model, data),
    ):
        assert torch.equal(again(data[20]), opt(data[20]))
        assert again.report.distilled == opt.report.distilled
    alone = fxopt.plan(
        model, opt.plan.budget, data[0], calibration=data, rewrites=["linear.low_rank"],
        keep=["0.down", "1.down"], recover=HOW,
    )  # fmt: skip
    assert alone.distilled == opt.plan.distilled
    assert alone.tensors.keys() == opt.plan.tensors.keys()
    assert all(torch.equal(t, opt.plan.tensors[name]) for name, t in alone.tensors.items())
    assert fxopt.verify(opt, model, data).kept


def test_refit_distils_again_where_the_calibration_does(
    model: nn.Module, data: list[Tensor], opt: Any
) -> None:
    again = fxopt.apply(model, opt.plan, example_inputs=data[0], calibration=data, refit=True)
    assert torch.equal(again(data[20]), opt(data[20]))
    assert any(note.startswith("distilled again: 2 of 2 blocks") for note in again.report.notes)
    assert again.report.distilled == opt.report.distilled
    assert not any(note.startswith("recover: ") for note in again.report.notes)
    few = fxopt.apply(model, opt.plan, example_inputs=data[0], calibration=data[:2], refit=True)
    assert any(note.startswith("not distilled again: ") for note in few.report.notes)
    assert not torch.equal(few(data[20]), opt(data[20]))
    assert_silent(few.report)


def assert_silent(report: Any) -> None:
    """Nothing is said of how the plan's own tensors were trained."""
    assert not report.distilled
    assert not any(note.startswith("recover: ") for note in report.notes)


@pytest.mark.parametrize("other", ["linear.low_rank", "keep"])
def test_other_choices_than_those_distilled(
    model: nn.Module, data: list[Tensor], opt: Any, other: str
) -> None:
    plan = opt.plan.model_copy(deep=True)
    plan.tensors = opt.plan.tensors
    decision = next(d for d in plan.decisions if d.rewrite == "linear.low_rank")
    labels = {a.label for a in decision.alternatives if a.rewrite == other} - {decision.label}
    plan.lock(decision.key, other, min(labels, default=None))
    assert_silent(fxopt.apply(model, plan, example_inputs=data[0], calibration=data).report)


def test_what_was_trained_is_shown_of_plans_and_modules(
    model: nn.Module, data: list[Tensor], opt: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def table(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line.startswith(("distilled", "0 "))]

    shown = table(str(opt.report))
    assert len(shown) == 2
    assert table(str(fxopt.verify(opt, model, data))) == shown
    assert cli.run(["report", str(opt.plan.save(tmp_path / "plan.json"))]) == 0
    assert table(capsys.readouterr().out) == shown


def test_a_budget_that_only_distillation_meets(model: nn.Module, data: list[Tensor]) -> None:
    def limit(value: float) -> fxopt.Budget:
        return fxopt.Budget(weights="80%", relative_error=value, minimize="memory")

    plain, better = (error(optimized(model, data, recover=how)) for how in (None, HOW))
    between = (plain * better) ** 0.5
    with pytest.raises(fxopt.BudgetError):
        optimized(model, data, budget=limit(between), recover=None)
    kept = optimized(model, data, budget=limit(between))
    assert kept.report.kept
    assert error(kept) <= between


def test_what_makes_the_whole_model_worse_is_undone(
    model: nn.Module, data: list[Tensor], opt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = session.distilled

    def spoilt(*given: Any) -> Any:
        made = original(*given)
        for tensors in made.anew.values():
            tensors["up"].mul_(2)
        return made

    plain = optimized(model, data, recover=None)
    monkeypatch.setattr(session, "distilled", spoilt)
    undone = optimized(model, data)
    # the search goes on after it, and may end at another choice
    assert error(undone) < 1.1 * error(plain)
    assert any("on the part to choose by: undone" in note for note in undone.report.notes)
    assert undone.plan.recover is None
    assert not undone.plan.distilled


NAN = float("nan")


@pytest.fixture(scope="module")
def again(model: nn.Module, data: list[Tensor]) -> session.Session:
    return started(model, data, recover=fxopt.Distill(steps=1))


def started(model: nn.Module, data: list[Tensor], **options: Any) -> session.Session:
    request = resolve(
        model, fxopt.Budget(relative_error=0.07, minimize="memory"), data[0], workload=None,
        calibration=data, keep=(), rewrites=["linear.low_rank"], at=None, seed=0, time_limit=None,
        **options,
    )  # fmt: skip
    return session.Session(Compiler(request))


@pytest.mark.parametrize(
    ("before", "after", "recorded"),
    [
        (0.2, 0.1, 0.1), (NAN, 0.1, 0.1),
        (0.2, 0.3, 0.2), (0.2, NAN, 0.2), (0.2, float("inf"), 0.2), (NAN, NAN, NAN),
    ],
)  # fmt: skip
def test_the_better_error_is_recorded(
    again: session.Session, monkeypatch: pytest.MonkeyPatch, before: float, after: float,
    recorded: float,
) -> None:  # fmt: skip
    choice = tuple(len(column) - 1 for column in again.table.columns)
    monkeypatch.setattr(Distillation, "improved", True)
    monkeypatch.setattr(again.measurer, "error", lambda _: after)
    rows = again._distilled(choice, {"error": before, "memory": 1.0})  # pyright: ignore[reportPrivateUsage]
    assert rows == pytest.approx({"error": recorded, "memory": 1.0}, nan_ok=True)
    made = again._made[choice]  # pyright: ignore[reportPrivateUsage]
    assert made.taken_back == (recorded is before)


def test_three_choices_are_distilled_in_all_and_stay_so(
    data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    search = started(nn.Sequential(Mlp(), Mlp(), Mlp()), data, recover=fxopt.Distill(steps=1))
    for i in range(6):  # mild choices, further below the limit than any that is distilled
        search._try(tuple(4 * (i == j) for j in range(6)))  # pyright: ignore[reportPrivateUsage]
    distilled, made = search._distilled, set[Any]()  # pyright: ignore[reportPrivateUsage]

    def well(choice: Any, rows: Any) -> Any:
        """As if all became so good that the solver goes on for as long as it may."""
        made.add(choice)
        return {**distilled(choice, rows), "error": 0.5 * 0.07**2}

    monkeypatch.setattr(search, "_distilled", well)
    best = search.search_best()
    assert len(made) == 3
    # what the part kept aside asks for is measured as fitted
    search.search.tighten(best, "error", 1.5)
    tried = len(search.search.trials)
    search.search_best()
    assert len(search.search.trials) > tried
    assert len(made) == 3
    # and what is handed out is what was measured
    assert search._made.keys() == made  # pyright: ignore[reportPrivateUsage]


def test_a_plan_with_nothing_to_train_says_so(model: nn.Module, data: list[Tensor]) -> None:
    kept = optimized(model, data, budget=fxopt.Budget(weights="70%"), rewrites=["linear.quantized"])
    assert any("recover: nothing was distilled" in note for note in kept.report.notes)


def test_blocks_are_steps_of_the_progress_shown(
    model: nn.Module, data: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    optimized(model, data, progress=True, recover=fxopt.Distill(steps=2))
    assert "distilling: 2 in " in capsys.readouterr().err


def test_ctrl_c_keeps_the_blocks_that_were_reached(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = distill._Segment.error, 0  # pyright: ignore[reportPrivateUsage]

    def pressed(segment: Any, sequences: Any) -> float:
        nonlocal calls
        calls += segment.block.name == "1"
        if calls == 2:
            raise KeyboardInterrupt
        return measure(segment, sequences)

    monkeypatch.setattr(distill._Segment, "error", pressed)  # pyright: ignore[reportPrivateUsage]
    opt = optimized(model, data)
    assert [block.block for block in opt.report.distilled] == ["0"]
    notes = opt.report.notes
    assert any("1 of 2 blocks are better" in n and "Ctrl-C ended it after 1" in n for n in notes)
    assert "Ctrl-C ended the search; this is the best plan measured so far" in notes
    again = fxopt.apply(model, opt.plan, example_inputs=data[0])
    assert torch.equal(again(data[20]), opt(data[20]))


def test_time_that_is_over_distils_nothing(model: nn.Module, data: list[Tensor]) -> None:
    opt = optimized(model, data, time_limit=1e-3)
    assert any("the time limit ended it after 0" in note for note in opt.report.notes)
    assert not opt.report.distilled


def test_a_plan_decided_again_is_not_yet_distilled(opt: Any) -> None:
    made = fxopt.solve(opt.plan, fxopt.Budget(weights="90%"))
    assert made.recover == HOW
    assert not made.distilled


def test_a_submodule(model: nn.Module, data: list[Tensor]) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (2.0 if x.sum().item() > 0 else 1.0)

    opt = optimized(Around().eval(), data, at="inner", keep=["inner.0.down", "inner.1.down"])
    assert [block.block for block in opt.report.distilled] == ["0", "1"]
    assert opt.report.distilled[0].after < opt.report.distilled[0].before


def test_too_few_sequences(model: nn.Module, data: list[Tensor]) -> None:
    with pytest.raises(FxoptError, match=r"recover: distillation holds .* four sequences or more"):
        optimized(model, data[:3])


def test_training_steps_are_not_distilled(model: nn.Module, data: list[Tensor]) -> None:
    with pytest.raises(FxoptError, match=r"recover: fxopt\.Train rewrites steps exactly"):
        fxopt.optimize(
            model, fxopt.Budget(activations="50%"), data[0],
            workload=fxopt.Train(batch=1, seq=63), recover=HOW,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("steps", 1.5), ("steps", True), ("batch", 0), ("patience", -1),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("learning_rate", float("inf")),
        ("holdout", 0.0), ("holdout", 1.0),
    ],
)  # fmt: skip
def test_fields_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Distill\.{field} must"):
        fxopt.Distill(**{field: value})


@pytest.mark.slow
def test_the_trained_model_at_half_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/linear.md has it, of a quarter of the text and a tenth of the steps."""
    pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "benchmarks" / "linear_quality.py"
    arguments = ["--only", "linear.low_rank", "--windows", "12", "--distill", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
    heads, _, line = (
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in capsys.readouterr().out.splitlines()
    )
    found = dict(zip(heads, line, strict=True))
    assert float(found["KL, distilled"]) < 0.95 * float(found["KL"])
    assert float(found["loss, distilled"]) < float(found["loss"])
