"""Progress is drawn on standard error only, when asked for or on a terminal; Ctrl-C ends a search
with what it has."""

from __future__ import annotations

import io
import logging
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import api, evidence
from fxopt import progress as progress_module
from fxopt.measure import Measurer
from fxopt.progress import Bars, Lines, Logged, showing, stepping


class Screen(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Standard error for the rest of the test; pytest would take it away from a fixture."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.mark.parametrize(
    ("on_terminal", "wanted", "kind"),
    [
        (True, None, Bars),
        (True, True, Bars),
        (True, False, Logged),
        (False, None, Logged),
        (False, True, Lines),
        (False, False, Logged),
    ],
)
def test_who_is_shown_what(
    monkeypatch: pytest.MonkeyPatch, on_terminal: bool, wanted: bool | None, kind: type
) -> None:
    terminal(monkeypatch)
    if not on_terminal:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    with showing(wanted) as progress:
        assert type(progress) is kind


def test_a_program_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with showing(None) as progress:
        assert type(progress) is Logged


def test_bars_count_and_estimate_and_are_gone_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = terminal(monkeypatch)
    with showing(None) as progress:
        for _ in progress.track("scoring", range(3)):
            print("a line of the user's")
        assert "0/3" in screen.getvalue()
        assert "3/3" in screen.getvalue()
        assert "left:" in screen.getvalue()
        with progress.stage("searching", 1) as advance:
            advance()
            advance()
        assert "2/2" in screen.getvalue()  # a total that was too small grew
        before = len(screen.getvalue())
        with progress.stage("capturing"):
            pass
        assert "0/?" in screen.getvalue()
        assert "left:" not in screen.getvalue()[before:]
    after_erasing = screen.getvalue().rpartition("\x1b[2K")[2]
    assert after_erasing.replace("\x1b[?25h", "").strip() == ""
    # standard output is the user's
    assert capsys.readouterr().out == "a line of the user's\n" * 3
    assert "user's" not in screen.getvalue()


def test_no_thread_draws_while_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    threads = threading.active_count()
    with showing(None) as progress, progress.stage("searching", 2):
        assert threading.active_count() == threads


def test_lines_for_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with showing(True) as progress:
        assert list(progress.track("scoring", [4, 5])) == [4, 5]
        with progress.stage("capturing"):
            pass
        with pytest.raises(ValueError, match="wrong"), progress.stage("searching", 2):
            raise ValueError("wrong")
    assert log.getvalue() == "scoring: 2 in 0 s\ncapturing: 0 s\n"


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_long_stage_says_now_and_then_how_far_it_is(
    hands: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Lines().stage("scoring", 9) as advance:
        for _ in range(8):
            hands[0] += 4.0
            advance()
    assert capsys.readouterr().err == (
        "scoring: 3 of 9 after 12 s\nscoring: 6 of 9 after 24 s\nscoring: 8 in 32 s\n"
    )


def test_without_a_terminal_the_log_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with caplog.at_level(logging.INFO, "fxopt"), showing(None) as progress:
        assert list(progress.track("scoring", [4, 5])) == [4, 5]
    assert caplog.record_tuples == [("fxopt", logging.INFO, "scoring: 2 in 0 s")]
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    ("level", "wanted", "said"),
    [(logging.WARNING, None, 2), (logging.WARNING, False, 0), (logging.INFO, None, 0)],
)
def test_who_hears_nothing_is_told_how_to_and_that_it_goes_on(
    hands: list[float], caplog: pytest.LogCaptureFixture, level: int, wanted: bool | None, said: int
) -> None:
    with caplog.at_level(level, "fxopt"), showing(wanted) as progress:
        for _ in progress.track("scoring", range(3)):
            assert not caplog.records
            hands[0] += 3.0
        for _ in progress.track("searching", range(9)):
            hands[0] += 6.0
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == said
    first, second = "searching: 2 of 9 after 12 s", "searching: 6 of 9 after 36 s"
    expected = [
        f"still at work after 21 s ({first}); progress=True, or a terminal, shows how far it is",
        f"still at work after 45 s ({second})",
    ]
    assert warned == expected[:said]


def test_stepping_counts_calls_that_end() -> None:
    steps: list[int] = []
    double = stepping(lambda: steps.append(1), lambda x: 2 // x)
    assert double(2) == 1
    with pytest.raises(ZeroDivisionError):
        double(0)
    assert steps == [1]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


BUDGET = fxopt.Budget(relative_error=0.05, weights="60%", minimize="memory")


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    torch.manual_seed(3)
    return Mlp().eval()


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 16, 64, generator=generator) for _ in range(4)]


def test_optimize_plan_apply_and_verify_report(
    mlp: Mlp,
    data: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stages(run: Any, wanted: bool | None) -> list[str]:
        # no score is known from the run before
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("empty")))
        capsys.readouterr()
        run(progress=wanted)
        captured = capsys.readouterr()
        assert captured.out == ""
        return [line.partition(":")[0] for line in captured.err.splitlines()]

    def optimize(progress: bool | None) -> Any:
        return fxopt.optimize(mlp, BUDGET, data[0], calibration=data, progress=progress)

    opt = optimize(False)
    plan = opt.plan
    decided = ["capturing", "recording", "timing", "scoring", "comparing", "searching"]
    assert stages(optimize, True) == [*decided, "verifying"]
    assert stages(optimize, None) == []  # pytest's standard error is no terminal
    calls = {
        "plan": lambda progress: fxopt.plan(
            mlp, BUDGET, data[0], calibration=data, progress=progress
        ),
        "apply": lambda progress: fxopt.apply(
            mlp, plan, example_inputs=data[0], calibration=data, progress=progress
        ),
        "verify": lambda progress: fxopt.verify(opt, mlp, data, progress=progress),
    }
    assert stages(calls["plan"], True) == decided
    assert stages(calls["apply"], True) == ["capturing"]
    assert stages(calls["verify"], True) == ["capturing", "verifying"]
    for call in calls.values():
        assert stages(call, None) == []


def test_training_steps_report_too(mlp: Mlp, capsys: pytest.CaptureFixture[str]) -> None:
    def stages(run: Any) -> list[str]:
        capsys.readouterr()
        run()
        return [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]

    x, budget = torch.randn(4, 9, 64), fxopt.Budget(activations="110%")
    work: Any = {"workload": fxopt.Train(batch=4, seq=9), "progress": True}
    made = fxopt.plan(mlp, budget, x, **work)
    found = ["measuring", "planning", "verifying"]
    assert stages(lambda: fxopt.optimize(mlp, budget, x, **work)) == found
    assert stages(lambda: fxopt.plan(mlp, budget, x, **work)) == found[:2]
    assert stages(lambda: fxopt.apply(mlp, made, example_inputs=x, progress=True)) == found
    assert stages(lambda: fxopt.plan(mlp, budget, x, **{**work, "progress": None})) == []


class Interrupted:
    """A measuring function in which somebody presses Ctrl-C at its call number `at`."""

    def __init__(self, measure: Any, at: set[int]) -> None:
        self.measure, self.at, self.calls = measure, at, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt
        return self.measure(*arguments, **named)


def marks(notes: list[str]) -> list[str]:
    return [note for note in notes if "best plan measured so far" in note]


CTRL_C = ["Ctrl-C ended the search; this is the best plan measured so far"]


def test_ctrl_c_in_the_search_gives_the_best_plan_measured_so_far(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: list[Any] = []

    def measure(measurer: Measurer, editor: Any, proposals: Any) -> dict[str, float]:
        choices.append(editor)
        found = original(measurer, editor, proposals)
        # so much better than predicted that the solver wants to go further
        return {**found, "error": found["error"] / 4}

    original, interrupted = Measurer.trial, Interrupted(measure, {2})
    monkeypatch.setattr(Measurer, "trial", lambda *arguments: interrupted(*arguments))
    opt = fxopt.optimize(mlp, BUDGET, data[0], calibration=data)
    assert (interrupted.calls, len(choices)) == (2, 1)
    assert opt.report.kept
    assert marks(opt.report.notes) == marks(opt.plan.notes) == CTRL_C
    assert [trial.taken for trial in opt.plan.trials] == [True]


def test_ctrl_c_before_any_choice_was_measured_still_measures_one(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = Interrupted(Measurer.trial, {1})
    monkeypatch.setattr(Measurer, "trial", lambda *arguments: interrupted(*arguments))
    made = fxopt.plan(mlp, BUDGET, data[0], calibration=data)
    assert interrupted.calls >= 2
    assert marks(made.notes) == CTRL_C
    assert [trial.taken for trial in made.trials].count(True) == 1


def test_ctrl_c_while_single_sites_are_compared(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Interrupted(api.Compiler.measure_column, {2})
    monkeypatch.setattr(api.Compiler, "measure_column", lambda self, c: compared(self, c))
    made = fxopt.plan(mlp, BUDGET, data[0], calibration=data)
    assert compared.calls == 2  # none after it
    assert marks(made.notes) == CTRL_C
    assert made.trials


def test_ctrl_c_while_a_module_is_verified_verifies_it_and_searches_no_more(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = Interrupted(Measurer.contract, {1})
    monkeypatch.setattr(Measurer, "contract", lambda *arguments: verified(*arguments))
    opt = fxopt.optimize(mlp, BUDGET, data[0], calibration=data)
    assert verified.calls == 2
    assert opt.report.kept
    assert marks(opt.report.notes) == marks(opt.plan.notes) == CTRL_C


def test_ctrl_c_while_the_plan_is_written_down(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Interrupted(evidence.shown, {1})
    monkeypatch.setattr(evidence, "shown", shown)
    made = fxopt.plan(mlp, BUDGET, data[0], calibration=data)
    assert shown.calls == 2
    assert marks(made.notes) == CTRL_C


def test_ctrl_c_while_the_original_is_tried_hands_out_what_is_nearest(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Interrupted(Measurer.trial, {1})

    def trial(measurer: Measurer, editor: Any, proposals: Any) -> Any:
        return (original if proposals else kept)(measurer, editor, proposals)

    original = Measurer.trial
    monkeypatch.setattr(Measurer, "trial", trial)
    impossible = fxopt.Budget(weights="1%", relative_error=1e-6)
    with pytest.raises(fxopt.BudgetError) as caught:
        fxopt.optimize(mlp, impossible, data[0], calibration=data)
    assert kept.calls == 2
    best = caught.value.best
    assert best is not None
    assert marks(best.report.notes) == CTRL_C


def test_a_second_ctrl_c_is_the_callers(
    mlp: Mlp, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = Interrupted(Measurer.trial, {1, 2})
    monkeypatch.setattr(Measurer, "trial", lambda *arguments: interrupted(*arguments))
    with pytest.raises(KeyboardInterrupt):
        fxopt.optimize(mlp, BUDGET, data[0], calibration=data)
