"""`optimize`, `plan` and `apply` for a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import passes
from ..decide.verify import weight_bytes
from ..ir.budget import Budget
from ..ir.errors import BudgetError, FxoptError, RowResult
from ..ir.plan import Plan
from ..ir.units import format_value
from ..ir.workload import Train
from ..show.report import Report
from . import measure
from .decisions import plan_of
from .module import Inputs, Run, TrainingModule, bound, clone
from .planned import Further, Layout, Pick, Request, as_decided, fastest, planned

ROWS = ("memory", "activations")
LEAST = 0.01
"""The least share by which the limit is tightened after a measured excess."""
TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 3e-2}


def optimize(
    model: nn.Module,
    budget: Budget,
    example: Mapping[str, Any],
    workload: Train,
    *,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    time_limit: float | None = None,
) -> TrainingModule:
    """A module whose training step on inputs like `example` keeps `budget`, as measured.

    `memory` is parameters and buffers plus the most bytes that a step ever has alive beyond
    them: activations, temporaries, gradients (`.grad` empty before) and the outputs, which the
    caller holds. `activations` is that peak without the bytes of all gradients. Raises
    BudgetError (with `.best`) naming the op at the peak when no plan is small enough.
    """
    session = _Session(model, budget, example, workload, keep, rewrites, time_limit)
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
) -> Plan:
    """The decision alone: nothing is measured but the original, and nothing is verified."""
    session = _Session(model, budget, example, workload, keep, rewrites, time_limit)
    _, layout = session.planned(fastest(session.limit))
    made = session.plan_of(layout, {})
    if layout.plan.peak > session.limit:
        made.notes.append("no plan was found that keeps every row; this is the smallest")
    return made


def apply(model: nn.Module, plan: Plan, example: Mapping[str, Any]) -> TrainingModule:
    """The module of `plan` for a step on inputs like `example`, without a search."""
    assert isinstance(plan.workload, Train)
    session = _Session(model, plan.budget, example, plan.workload, (), None, None)
    plan.check_rewrites({r.name: r.version for r in session.request.rewrites})
    run, layout = session.planned(as_decided(plan))
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
    ) -> None:
        _check(budget, workload, example)
        wanted = tuple(r for r in passes.load(rewrites) if workload.kind in r.workloads)
        self.request = Request(workload, wanted, tuple(keep), time_limit)
        self.budget = budget
        self.model = clone(model).train()
        self.inputs: Inputs = bound(self.model, (), example)
        self.weights = weight_bytes(model)
        self.gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.notes: list[str] = []
        self.before = self._original()
        self.reserve = 1.0

    def _original(self) -> int | None:
        """The peak of the original's step, None where the device cannot hold it."""
        try:
            return measure.peak(self.model, self.inputs)
        except torch.OutOfMemoryError:
            self.notes.append("the original's step does not fit the device: nothing to compare")
            return None

    def planned(self, pick: Pick) -> tuple[Run, Layout]:
        return planned(self.model, self.inputs, self.request, pick)

    @property
    def limit(self) -> float:
        """The peak that the rows allow a step, in bytes beyond parameters and buffers."""
        rows = zip(ROWS, (-self.weights, self.gradients), strict=True)
        return self.reserve * min(self.limits[n] + more for n, more in rows if n in self.limits)

    @property
    def limits(self) -> dict[str, float]:
        """The rows in bytes. Shares refer to the original's step on the example."""
        known = self._rows(self.before)
        return self.budget.absolute({name: v for name, v in known if v is not None})

    def optimize(self) -> TrainingModule:
        """Plan, run and measure; where more was alive than counted, ask for less."""
        while True:
            run, layout = self.planned(fastest(self.limit))
            module, rows = self.verified(run, layout)
            excess = max(row.excess for row in rows if row.limit is not None)
            if excess <= 0:
                return module
            if layout.plan.peak > self.limit:
                raise self._too_small(module, layout, rows)
            self.reserve /= 1 + max(excess, LEAST)

    def verified(self, run: Run, layout: Layout) -> tuple[TrainingModule, list[RowResult]]:
        """The module of a layout, its rows measured and its gradients compared with eager's."""
        ceiling = max(self.limit, float(layout.plan.peak))
        module = TrainingModule(self.model, Further(self.request, ceiling))
        module.adopt(self.inputs, run)
        notes = list(self.notes)
        measured: dict[str, float] = {"peak": measure.peak(module, self.inputs)}
        if self.before is not None:
            notes.append(self._compared(module))
            timing = measure.seconds(self.model, module, self.inputs)
            measured |= {"before": timing.first, "latency": timing.second}
        made = self.plan_of(layout, measured)
        made.notes = notes
        module.plan, module.report = made, Report(made.totals, notes)
        return module, made.totals

    def _compared(self, module: TrainingModule) -> str:
        """A note on losses and gradients against eager's; FxoptError where they are not its."""
        eager = measure.outcome(self.model, self.inputs)
        name, off = eager.difference(measure.outcome(module, self.inputs))
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        if off > TOLERANCE.get(dtype, 1e-3):
            raise FxoptError(
                f"the traced step is not the eager one: {name} differs by a relative {off:.2g} on "
                "the example inputs; does the forward depend on values, on time or on random "
                "numbers of its own? Optimise the submodules around that part"
            )
        if off == 0.0:
            return "outputs, gradients, buffers and random state are bit-equal to eager's"
        return f"{name} differs most from eager's, by a relative {off:.2g}"

    def _rows(self, peak: float | None) -> list[tuple[str, float | None]]:
        """What the rows say of a step's peak beyond parameters and buffers."""
        if peak is None:
            return [(name, None) for name in ROWS]
        return list(zip(ROWS, (self.weights + peak, peak - self.gradients), strict=True))

    def plan_of(self, layout: Layout, measured: Mapping[str, float]) -> Plan:
        """The plan of a layout; `measured` has "peak", "before" and "latency" where known."""
        peaks = (layout.plan.peak, measured.get("peak"), self.before)
        rows = [
            RowResult(name, self.limits.get(name), predicted, found, "bytes", before)
            for (name, predicted), (_, found), (_, before) in zip(
                *(self._rows(peak) for peak in peaks), strict=True
            )
        ]
        if "latency" in measured:
            slow = measured["before"] + layout.plan.seconds
            rows.append(
                RowResult("latency", None, slow, measured["latency"], "s", measured["before"])
            )
        return plan_of(layout, self.request.workload, self.budget, rows, self.model, self.notes)

    def _too_small(
        self, module: TrainingModule, layout: Layout, rows: list[RowResult]
    ) -> BudgetError:
        worst = max((r for r in rows if r.limit is not None), key=lambda r: r.excess)
        return BudgetError(
            f"no plan keeps {worst.name}: the smallest measured "
            f"{format_value(worst.measured, 'bytes')}, the limit is "
            f"{format_value(worst.limit, 'bytes')}. Its peak stands at {layout.widest}, with "
            f"{format_value(self.weights, 'bytes')} of parameters and buffers and "
            f"{format_value(self.gradients, 'bytes')} of gradients beside the "
            "activations; give more memory or a smaller batch. The smallest plan is in .best",
            rows, worst.name, module,
        )  # fmt: skip


def _check(budget: Budget, workload: Train, example: Mapping[str, Any]) -> None:
    refused = [row for row in budget.rows() if row not in ROWS]
    if refused:
        raise FxoptError(
            f"Budget.{refused[0]}: the workload fxopt.Train takes the rows memory and activations "
            "(in this version every plan is exact, and the fastest within them is taken)"
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
