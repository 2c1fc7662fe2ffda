"""`optimize`, `plan` and `apply` for a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import passes
from ..decide import disturbed
from ..decide.verify import weight_bytes
from ..ir.budget import Budget
from ..ir.errors import BudgetError, FxoptError, RowResult
from ..ir.plan import Plan
from ..ir.rewrite import Rewrite
from ..ir.units import format_value
from ..ir.workload import Train
from ..show.report import Report
from . import measure
from .decisions import plan_of
from .losses import head_notes
from .module import Inputs, Run, TrainingModule, bound, clone
from .planned import Layout, Request
from .timeline import memory_of
from .variants import Further, decided_step, fastest_step

Stage = Callable[[str], AbstractContextManager[Any]]
"""Given the name of work, what is entered while it is under way: who shows progress."""
ROWS = ("memory", "activations")
ERROR = "relative_error"
LEAST = 0.01
"""The least share by which the limit is tightened after a measured excess."""
TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 3e-2}
OTHER_SUMS = 10
"""So many times more may the worst tensor differ where sums are taken in another order."""


def optimize(
    model: nn.Module,
    budget: Budget,
    example: Mapping[str, Any],
    workload: Train,
    *,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    time_limit: float | None = None,
    stage: Stage = nullcontext,
) -> TrainingModule:
    """A module whose training step on inputs like `example` keeps `budget`, as measured.

    `memory` is parameters and buffers, on CUDA what libraries keep from call to call, plus the most
    bytes that a step ever has alive beyond them: activations, temporaries, gradients (`.grad` empty
    before) and the outputs, which the caller holds. `activations` is that peak without the bytes of
    all gradients. With a `relative_error` row the backward may read rounded tensors: the norm of
    what the gradients of all parameters are off by, relative to theirs in eager, on the example.
    Raises BudgetError (with `.best`) naming the op at the peak when no plan is small enough.
    """
    session = _Session(model, budget, example, workload, keep, rewrites, time_limit, stage)
    return session.optimize()


def plan(
    model: nn.Module,
    budget: Budget,
    example: Mapping[str, Any],
    workload: Train,
    *,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    time_limit: float | None = None,
    stage: Stage = nullcontext,
) -> Plan:
    """The decision alone: nothing is measured but the original, and nothing is verified."""
    session = _Session(model, budget, example, workload, keep, rewrites, time_limit, stage)
    _, layout = session.planned()
    made = session.plan_of(layout, {})
    if layout.plan.peak > session.limit:
        made.notes.append("no plan was found that keeps every row; this is the smallest")
    return made


def apply(
    model: nn.Module, plan: Plan, example: Mapping[str, Any], *, stage: Stage = nullcontext
) -> TrainingModule:
    """The module of `plan` for a step on inputs like `example`, without a search."""
    assert isinstance(plan.workload, Train)
    # those that are tried on request were asked for when the plan was made
    named = {d.rewrite for d in plan.rewritten} & set(passes.available())
    offered = sorted({r.name for r in passes.load()} | named)
    session = _Session(model, plan.budget, example, plan.workload, (), offered, None, stage)
    plan.check_rewrites({r.name: r.version for r in session.request.rewrites})
    with stage("planning"):
        run, layout = decided_step(session.model, session.inputs, session.request, plan)
    if layout.structure != plan.fingerprint_structure:
        raise FxoptError(
            "the plan was made for other ops or shapes than this step has (fingerprint_structure "
            "differs); make it again with fxopt.plan for this model and these inputs"
        )
    module, _ = session.verified(run, layout)
    return module


class _Session:
    """One model, one budget, one example: measures the original, then makes modules."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        example: Mapping[str, Any],
        workload: Train,
        keep: Iterable[str],
        rewrites: Sequence[str] | None,
        time_limit: float | None,
        stage: Stage,
    ) -> None:
        _check(budget, workload, example)
        wanted = _wanted(budget, workload, rewrites)
        self.request = Request(workload, wanted, tuple(keep), time_limit)
        self.budget = budget
        self.model = clone(model).train()
        self.inputs: Inputs = bound(self.model, (), example)
        self.weights = weight_bytes(model)
        self.gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.notes: list[str] = []
        self._stage = stage
        self.libraries = 0
        self.before = self._original()
        self.reserve = 1.0
        self.scale = 1.0

    def _original(self) -> int | None:
        """The peak of the original's step, None where the device cannot hold it."""
        try:
            with self._stage("measuring"):
                peak = measure.peak(self.model, self.inputs)
                self.libraries = measure.libraries(self.model, self.inputs)
                return peak
        except torch.OutOfMemoryError:
            if self.budget.relative_error:
                raise FxoptError(
                    "Budget.relative_error: the original's step does not fit the device, so there "
                    "are no gradients to compare with; leave the row out (plans are exact then), "
                    "or plan for a smaller batch"
                ) from None
            self.notes.append("the original's step does not fit the device: nothing to compare")
            self.libraries = self._of_a_product()
            return None

    def _of_a_product(self) -> int:
        """What libraries keep of one layer, where the model's own step cannot be run."""
        like = next(self.model.parameters())
        layer = nn.Linear(16, 16, device=like.device, dtype=like.dtype)
        return measure.libraries(layer, {"input": torch.ones_like(layer.weight)})

    @property
    def held(self) -> int:
        """Bytes that are there before a step: parameters, buffers, what libraries keep."""
        return self.weights + self.libraries

    def planned(self, error: float | None = None) -> tuple[Run, Layout]:
        """The fastest step within the rows by what is known so far, or that may err so much."""
        error = self.error if error is None else error
        with self._stage("planning"):
            run, layout = fastest_step(self.model, self.inputs, self.request, self.limit, error)
        return run, replace(layout, scale=self.scale)

    @property
    def error(self) -> float:
        """The error that plans may be expected to make, before `scale`."""
        return (self.budget.relative_error or 0.0) / self.scale

    @property
    def limit(self) -> float:
        """The peak that the rows allow a step, in bytes beyond parameters and buffers."""
        return self.reserve * self._allowed()[0]

    @property
    def limits(self) -> dict[str, float]:
        """The rows as numbers. Shares refer to the original's step on the example."""
        known = self._rows(self.before)
        return self.budget.absolute({name: v for name, v in known if v is not None})

    def optimize(self) -> TrainingModule:
        """Plan, run and measure; where more was alive, or erred, than counted, ask for less.

        Where the prior of errors leaves no plan that is small enough, what one errs is measured
        first.
        """
        corrected = not self.budget.relative_error
        while True:
            run, layout = self.planned()
            bold = layout.plan.peak > self.limit and not corrected
            if bold:
                run, layout = self.planned(math.inf)
            module, rows = self.verified(run, layout)
            excess = {row.name: row.excess for row in rows if row.limit is not None}
            error, peak = excess.pop(ERROR, 0.0), max(excess.values())
            if max(error, peak) <= 0:
                return module
            if error > 0 and not layout.plan.error:
                raise self._not_eager(module, rows)
            if bold:
                corrected = True
                self._correct(layout, rows)
            elif error > 0:
                self.scale *= 1 + max(error, LEAST)
            elif layout.plan.peak <= self.limit:
                self.reserve /= 1 + max(peak, LEAST)
            else:
                raise self._too_small(module, layout, rows)

    def _correct(self, layout: Layout, rows: list[RowResult]) -> None:
        """Let the prior of errors say of this plan what was measured."""
        measured = next(row.measured for row in rows if row.name == ERROR)
        if layout.error and measured:
            self.scale *= measured / layout.error

    def _not_eager(self, module: TrainingModule, rows: list[RowResult]) -> BudgetError:
        return BudgetError(
            f"no plan keeps {ERROR}: with nothing rounded the gradients differ from eager's by "
            f"{next(r.measured for r in rows if r.name == ERROR):.2g}, by the order of sums in "
            "other kernels; allow more than that. The plan is in .best",
            rows, ERROR, module,
        )  # fmt: skip

    def verified(self, run: Run, layout: Layout) -> tuple[TrainingModule, list[RowResult]]:
        """The module of a layout, its rows measured and its gradients compared with eager's."""
        with self._stage("verifying"):
            return self._verified(run, layout)

    def _verified(self, run: Run, layout: Layout) -> tuple[TrainingModule, list[RowResult]]:
        ceiling = max(self.limit, float(layout.plan.peak))
        module = TrainingModule(self.model, Further(self.request, ceiling, self.error, layout.cut))
        module.adopt(self.inputs, run)
        measure.give_back(measure.device_of(self.model))  # of the streams that ops were timed on
        notes = [*self.notes, *head_notes(layout)]
        measured: dict[str, float] = {"peak": measure.peak(module, self.inputs)}
        if self.before is not None:
            note, measured[ERROR] = self._compared(module, layout)
            timing = measure.seconds(self.model, module, self.inputs)
            notes += [*disturbed.notes({"the step": timing.spreads}), note]
            measured |= {"before": timing.first, "latency": timing.second}
        measure.watched(module, self.inputs, layout.probe)
        made = self.plan_of(layout, measured)
        made.notes = notes
        module.plan, module.report = made, Report(made.totals, notes, memory=made.memory)
        return module, made.totals

    def _compared(self, module: TrainingModule, layout: Layout) -> tuple[str, float]:
        """A note on losses and gradients against eager's, and the error of all gradients together;
        FxoptError where those are not eager's that should be."""
        rounded = layout.plan.error > 0
        eager = measure.outcome(self.model, self.inputs)
        found = measure.outcome(module, self.inputs)
        if layout.cut:
            eager = eager.without(eager.outputs - found.outputs)
        name, off = eager.difference(found, gradients=not rounded)
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        # every layer below a head passes the rounding of its sums on, in each tensor anew
        if off > TOLERANCE.get(dtype, 1e-3) * (OTHER_SUMS if layout.cut else 1):
            raise FxoptError(
                f"the traced step is not the eager one: {name} differs by a relative {off:.2g} on "
                "the example inputs; does the forward depend on values, on time or on random "
                "numbers of its own? Optimise the submodules around that part"
            )
        error = eager.gradient_error(found)
        if rounded:
            worst, by = eager.difference(found)
            what = "reads rounded tensors" if layout.plan.images else "leaves out small gradients"
            return f"the backward {what}: {worst} is off most, by {by:.2g}", error
        if off == 0.0:
            return "outputs, gradients, buffers and random state are bit-equal to eager's", error
        return f"{name} differs most from eager's, by a relative {off:.2g}", error

    def _rows(self, peak: float | None) -> list[tuple[str, float | None]]:
        """What the rows say of a step's peak beyond parameters and buffers."""
        if peak is None:
            return [(name, None) for name in ROWS]
        return list(zip(ROWS, (self.held + peak, peak - self.gradients), strict=True))

    def plan_of(self, layout: Layout, measured: Mapping[str, float]) -> Plan:
        """The plan of a layout; `measured` has "peak", "relative_error", "before" and "latency"
        where known."""
        peaks = (layout.plan.peak, measured.get("peak"), self.before)
        rows = [
            RowResult(name, self.limits.get(name), predicted, found, "bytes", before)
            for (name, predicted), (_, found), (_, before) in zip(
                *(self._rows(peak) for peak in peaks), strict=True
            )
        ]
        if self.budget.relative_error:
            allowed, error = self.limits[ERROR], measured.get(ERROR)
            rows.append(RowResult(ERROR, allowed, layout.error, error, "", 0.0))
        if "latency" in measured:
            slow = measured["before"] + layout.plan.seconds
            rows.append(
                RowResult("latency", None, slow, measured["latency"], "s", measured["before"])
            )
        made = plan_of(layout, self.request.workload, self.budget, rows, self.model, self.notes)
        made.memory = memory_of(layout, self.held, *self._allowed())
        return made

    def _allowed(self) -> tuple[float, str]:
        """What the tightest byte row allows beyond parameters and buffers, and its name."""
        more = dict(zip(ROWS, (-self.held, self.gradients), strict=True))
        return min((limit + more[n], n) for n, limit in self.limits.items() if n in more)

    def _too_small(
        self, module: TrainingModule, layout: Layout, rows: list[RowResult]
    ) -> BudgetError:
        worst = max((r for r in rows if r.limit is not None), key=lambda r: r.excess)
        more = f", a larger {ERROR}" if self.budget.relative_error else ""
        return BudgetError(
            f"no plan keeps {worst.name}: the smallest measured "
            f"{format_value(worst.measured, 'bytes')}, the limit is "
            f"{format_value(worst.limit, 'bytes')}. Its peak stands at {layout.widest}, with "
            f"{format_value(self.held, 'bytes')} of parameters, buffers and workspaces and "
            f"{format_value(self.gradients, 'bytes')} of gradients beside the "
            f"activations; give more memory{more} or a smaller batch. "
            "The smallest plan is in .best",
            rows, worst.name, module,
        )  # fmt: skip


def _wanted(budget: Budget, workload: Train, rewrites: Sequence[str] | None) -> tuple[Rewrite, ...]:
    """The rewrites of training steps that the budget allows."""
    found = [r for r in passes.load(rewrites) if workload.kind in r.workloads]
    wanted = tuple(r for r in found if r.exact or budget.relative_error)
    if found and not wanted:
        raise FxoptError(
            f"rewrites: {', '.join(r.name for r in found)} rounds what the backward reads, which "
            "the budget must allow: add relative_error, for example relative_error=0.01"
        )
    return wanted


def _check(budget: Budget, workload: Train, example: Mapping[str, Any]) -> None:
    refused = [row for row in budget.rows() if row not in (*ROWS, ERROR)]
    if refused:
        raise FxoptError(
            f"Budget.{refused[0]}: the workload fxopt.Train takes the rows memory and activations, "
            "and relative_error, without which every plan is exact (the fastest within them is "
            "taken)"
        )
    if not budget.cost_rows:
        raise FxoptError(
            "Budget.relative_error: fxopt.Train rounds what is saved to keep a byte row; add "
            'memory or activations, for example activations="40%"'
        )
    first = next((v for v in example.values() if isinstance(v, Tensor)), None)
    if first is None:
        raise FxoptError("example_inputs: no tensor among them; pass a batch of a training step")
    sizes = (workload.batch, workload.seq)[: 2 if first.dim() == 2 else 1]
    if tuple(first.shape[: len(sizes)]) != sizes:
        raise FxoptError(
            f"example_inputs are shaped {tuple(first.shape)}, the workload says "
            f"Train(batch={workload.batch}, seq={workload.seq}): a step is planned for one size, "
            "so pass an example of the largest batch that you train on"
        )
