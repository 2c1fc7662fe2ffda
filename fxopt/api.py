"""The public functions: `optimize`, `plan`, `solve`, `frontier`, `apply`, `verify`, `load`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from . import training
from .capture import weightless
from .compiler import Compiler
from .decide.again import solve_again
from .distilled import SAID
from .frontiers import Frontier
from .hosted import Optimized, load_into
from .ir.budget import Budget
from .ir.distill import Distill
from .ir.errors import FxoptError, PlanError
from .ir.plan import Plan
from .ir.workload import Forward, Generate, Train, Workload
from .measure import Measurer
from .progress import Progress, showing
from .replay import check_tensors, installed, replay
from .request import Request, check_recovery, resolve, training_step
from .session import Session
from .show.report import Report
from .state import evaluated, preserved
from .training.module import TrainingModule
from .weightless import Draft, Weightless

C = TypeVar("C", bound=Compiler)
UNLIMITED = 1e9
"""A quality row that no plan exceeds."""


def optimize(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any = None,
    *,
    workload: Workload | Mapping[str, Forward | Generate] | None = None,
    calibration: Iterable[Any] | None = None,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    at: str | None = None,
    recover: Distill | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool | None = None,
) -> Optimized | TrainingModule:
    """Rewrite `model` so that it keeps `budget`, and measure that it does.

    Returns a module with the same signature and output class, with `.plan` and `.report`; the
    original is not changed. `example_inputs` (tensor, tuple or dict) may be omitted for Hugging
    Face models, `calibration` is an iterable of such inputs. `workload` may be a mapping: several
    by name, each with latency rows of its own. `keep` names sites left alone, `rewrites` the
    rewrites to use: names or `re:` patterns. `at` names a submodule: only that is captured and
    rewritten, inputs and budget are of the whole model, which stays as it is around it and need
    not be a graph; `save` then writes the submodule (`OptimizedHost.save`). `recover` trains what
    linear layers became, block by block, before a choice is measured; see `Distill`.
    Raises BudgetError (with `.best`) when no plan was measured to keep every row, CaptureError
    when the model cannot be captured. `time_limit` in seconds bounds scoring and search; Ctrl-C
    during the search does what the end of that time does. `progress` draws bars on standard error
    (None: when that is a terminal); elsewhere the logger `fxopt` has the stages at INFO. An
    `fxopt.Train` workload gives a `TrainingModule`, whose whole training step keeps the `memory` or
    `activations` of the budget; see docs/activation-memory.md.
    """
    check_recovery(recover)
    step = training_step(model, budget, example_inputs, workload, calibration, at)
    if step is not None:
        _check_exact(recover)
        with preserved(model), showing(progress) as shown:
            return training.optimize(
                model, budget, *step, keep=keep, rewrites=rewrites, time_limit=time_limit,
                stage=shown.stage,
            )  # fmt: skip
    request = resolve(
        model, budget, example_inputs, workload=workload, calibration=calibration, keep=keep,
        rewrites=rewrites, at=at, seed=seed, time_limit=time_limit, recover=recover,
    )  # fmt: skip
    with evaluated(model), showing(progress) as shown:
        return Session(_compiler(request, shown)).optimize()


def plan(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any = None,
    *,
    workload: Workload | Mapping[str, Forward | Generate] | None = None,
    calibration: Iterable[Any] | None = None,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    at: str | None = None,
    recover: Distill | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool | None = None,
) -> Plan:
    """The decision alone: as `optimize`, but what is chosen is not emitted or verified.

    A budget that no plan is predicted to keep gives the nearest plan, and a note that says so.

    A model on the meta device is planned without weights, for the device of `example_inputs`, or
    for the GPU where there is one: every row is predicted and nothing of the model is run. Only
    rewrites that are exact or round take part, chosen for the least rounding; a quality row is an
    FxoptError. `apply` puts such a plan on the model with its weights.
    """
    check_recovery(recover)
    step = training_step(model, budget, example_inputs, workload, calibration, at)
    if step is not None:
        _check_exact(recover)
        with preserved(model), showing(progress) as shown:
            return training.plan(
                model, budget, *step, keep=keep, rewrites=rewrites, time_limit=time_limit,
                stage=shown.stage,
            )  # fmt: skip
    request = resolve(
        model, budget, example_inputs, workload=workload, calibration=calibration, keep=keep,
        rewrites=rewrites, at=at, seed=seed, time_limit=time_limit, recover=recover,
    )  # fmt: skip
    with evaluated(model), showing(progress) as shown:
        if weightless(model):
            return Draft(_compiler(request, shown, Weightless)).plan()
        return Session(_compiler(request, shown)).plan()


def _check_exact(recover: Distill | None) -> None:
    if recover is not None:
        raise FxoptError("recover: fxopt.Train rewrites steps exactly; leave recover out")


def solve(
    plan: Plan | str | Path, budget: Budget | None = None, *, time_limit: float = 10.0
) -> Plan:
    """Decide the sites of `plan`, or of the file of one, that are not locked again, without the
    model.

    `budget` is the plan's own unless given: edit, lock, and see what the rest becomes, or what
    another budget would. Costs and errors are those in the plan, and the new plan is a prediction:
    realise it with `apply`, measure it with `verify`. PlanError for a row that the plan cannot
    tell (activations, single calls), and of a training step.
    """
    plan = _read(plan)
    if isinstance(plan.workload, Train):
        raise PlanError("a plan of a training step is solved with its graph: use fxopt.plan")
    return solve_again(plan, budget, time_limit=time_limit)


def apply(
    model: nn.Module,
    plan: Plan | str | Path,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    refit: bool = False,
    progress: bool | None = None,
) -> Optimized | TrainingModule:
    """Realise `plan`, or that in the file of one, on `model` without searching.

    With the plan's prepared tensors the result is that of the first time, bit for bit; without
    them, or with `refit=True` (a fine-tune of the model), they are fitted from `calibration`, and
    the report says so. PlanError when the plan was made for another model, or (without refit) for
    other weights.
    """
    plan = _read(plan)
    step = training_step(model, plan.budget, example_inputs, plan.workload, calibration, plan.at)
    if step is not None:
        with preserved(model), showing(progress) as shown:
            return training.apply(model, plan, step[0], stage=shown.stage)
    request = resolve(
        model, plan.budget, example_inputs, workload=plan.workload, calibration=calibration,
        keep=(), rewrites=installed(plan), at=plan.at, seed=0, time_limit=None, fits=False,
    )  # fmt: skip
    with evaluated(model), showing(progress) as shown:
        return replay(_compiler(request, shown), plan, refit=refit)


def _read(plan: object) -> Plan:
    """A plan as it is, or from its file."""
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    if not isinstance(plan, Plan):
        raise FxoptError(f"plan: takes fxopt.Plan or the path of its file, not {plan!r:.80}")
    return plan


def verify(
    opt: Optimized,
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Report:
    """Measure the rows of `opt.plan.budget` again, against `model`, on `calibration`.

    The last third of `calibration` is measured on, as by `optimize`; `example_inputs` default to
    its first item. PlanError when `opt` was made of another model, or was changed since.
    """
    if not isinstance(getattr(opt, "plan", None), Plan):
        raise FxoptError(
            f"opt: takes what optimize, apply or load returned, then the original model, not "
            f"{type(opt).__name__}"
        )
    items = None if calibration is None else list(calibration)
    example = items[0] if items and example_inputs is None else example_inputs
    request = resolve(
        model, opt.plan.budget, example, workload=opt.plan.workload, calibration=items,
        keep=(), rewrites=installed(opt.plan), at=opt.plan.at, seed=0, time_limit=None,
    )  # fmt: skip
    with evaluated(model), showing(progress) as shown:
        request.calibration.warn()
        compiler = _compiler(request, shown)
        replayed = replay(compiler, opt.plan, refit=False)
        check_tensors(opt, replayed)
        editor = replayed.editor
        assert editor is not None
        measurer = Measurer(compiler)
        measured = measurer.contract(editor, opt) | measurer.minimised(opt)
        rows = measurer.rows({}, measured)
    # of the plan's notes those of its search are stale, that of how its tensors were trained is not
    trained = [note for note in replayed.report.notes if note.startswith(SAID)]
    return Report(rows, [*measurer.said(), *trained], distilled=replayed.report.distilled)


def load(path: str | Path, model: nn.Module | None = None) -> Optimized:
    """Load what `opt.save(path)` wrote; nothing from the folder is executed.

    A folder of a submodule (`at=`) gives that submodule, or with `model` a copy of the model with
    the submodule in its place.
    """
    from .emit.save import load as load_folder

    if model is None:
        return load_folder(path)
    device = next((p.device for p in model.parameters()), "cpu")
    return load_into(model, load_folder(path, device))


def frontier(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    workload: Workload | Mapping[str, Forward | Generate] | None = None,
    calibration: Iterable[Any] | None = None,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    at: str | None = None,
    quality: Literal["kl", "loss_increase", "relative_error"] = "kl",
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool | None = None,
) -> Frontier:
    """Every plan that no other beats in latency, memory (weights and KV cache) and error at once.

    The model is scored once. What comes back prints as a table and draws itself (`to_svg`), and
    `.plan(budget)` and `.optimize(budget)` answer further budgets from the same scores. `quality`
    is the row that errors are counted in; other arguments as of `optimize`. Points are
    predictions, corrected by a few plans that were realised; only `.optimize` measures a contract.
    """
    if quality not in ("kl", "loss_increase", "relative_error"):
        raise FxoptError(f"quality: takes kl, loss_increase or relative_error, not {quality!r}")
    rows: dict[str, Any] = {quality: UNLIMITED}
    request = resolve(
        model, Budget(**rows, minimize="latency"), example_inputs, workload=workload,
        calibration=calibration, keep=keep, rewrites=rewrites, at=at, seed=seed,
        time_limit=time_limit,
    )  # fmt: skip
    with evaluated(model), showing(progress) as shown:
        return Frontier(_compiler(request, shown))


def _compiler(request: Request, progress: Progress, kind: type[C] = Compiler) -> C:
    with progress.stage("capturing"):
        return kind(replace(request, progress=progress))
