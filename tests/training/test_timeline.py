"""Who holds memory over a step: as counted, and as it was watched op by op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt.ir.evidence import Memory
from fxopt.training import TrainingModule, measure, timeline
from fxopt.training.planned import Layout, Request, planned
from fxopt.training.search import StepPlan
from fxopt.training.sites import Saved
from fxopt.training.timeline import memory_of
from tests.training.test_images import REWRITES, at_random

Example = tuple[nn.Module, dict[str, Any]]


def made(example: Example) -> tuple[TrainingModule, Layout]:
    """A step that does anything with any saved tensor."""
    model, inputs = example

    def pick(saved: Saved, _deadline: float) -> StepPlan:
        return StepPlan(at_random(saved), frozenset()).counted(saved.step, saved.seconds)

    request = Request(fxopt.Train(1, 1), REWRITES, (), None)
    run, layout = planned(model, inputs, request, pick, {})
    module = TrainingModule(model, lambda *_: run)
    module.adopt(inputs, run)
    return module, layout


def off_by(memory: Memory) -> np.ndarray:
    """By how much each point was measured beyond its prediction, as a share of the peak."""
    assert memory.measured is not None
    return (np.array(memory.measured) - memory.predicted) / max(memory.predicted)


def test_what_was_watched_is_what_was_counted(example: Example) -> None:
    module, layout = made(example)
    before = measure.outcome(module, example[1])
    measure.watched(module, example[1], layout.probe)
    memory = memory_of(layout, 0, None, "")
    assert memory.measured is not None
    assert max(memory.predicted) == layout.plan.peak
    assert max(memory.measured) == pytest.approx(measure.peak(module, example[1]), rel=2e-3)
    off = off_by(memory)
    assert np.median(np.abs(off)) < 1e-3
    assert np.mean(np.abs(off) < 0.02) > 0.9
    assert off.min() > -0.05
    # the step that was watched left nothing on, and nothing behind
    assert not layout.probe.on
    assert before.difference(measure.outcome(module, example[1])) == ("", 0.0)


def test_holders_are_those_of_the_plan(small: Example) -> None:
    _, layout = made(small)
    memory = memory_of(layout, 100, 2000.0, "memory")
    assert (memory.weights, memory.limit, memory.limited_by) == (100, 2000.0, "memory")
    assert memory.measured is None
    assert memory.peak_at == layout.widest
    assert all(value >= 0 for values in memory.holders.values() for value in values)
    # those of a tied parameter's two uses are added after the step
    named = small[0].named_parameters(remove_duplicate=False)
    gradients = sum(p.nbytes for _, p in named)
    assert memory.holders["gradients"][-1] == gradients
    assert not any(memory.holders["gradients"][: memory.border])
    assert not any(memory.holders.get("again", [0])[: memory.border])
    # at the border what waits for the backward is alive, in one form or another
    waiting = sum(policy.waiting for policy in memory.policies)
    forms = ("kept", "codes", "offloaded")
    held = sum(memory.holders[name][memory.border] for name in forms if name in memory.holders)
    outputs = memory.holders["outputs"][memory.border]
    assert abs(waiting - held) <= outputs
    names = [span.name for span in memory.spans]
    layers = [name for name in names if name.startswith("blocks.")]
    assert layers == ["blocks.0", "blocks.1", "blocks.1", "blocks.0"]


def test_policies_add_up(small: Example) -> None:
    _, layout = made(small)
    policies = memory_of(layout, 0, None, "").policies
    saved, choices = layout.saved, layout.plan.choices
    assert sum(p.bytes for p in policies) == sum(saved.step.bytes[o] for o in saved.step.saved)
    assert sum(p.tensors for p in policies) == len(saved.step.saved)
    assert sum(p.tensors for p in policies if p.rewrite != "keep") == len(choices)
    assert sum(p.seconds for p in policies) == pytest.approx(layout.plan.seconds)
    assert sum(p.host for p in policies) == layout.plan.host


def test_points_are_few_and_keep_the_most(small: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    module, layout = made(small)
    measure.watched(module, small[1], layout.probe)
    whole = memory_of(layout, 0, None, "")
    monkeypatch.setattr(timeline, "POINTS", 20)
    few = memory_of(layout, 0, None, "")
    assert len(few.predicted) <= 20 < len(whole.predicted)
    assert 0 < few.border < len(few.predicted)
    assert few.measured is not None
    assert whole.measured is not None
    assert max(few.predicted) == max(whole.predicted)
    assert max(few.measured) == max(whole.measured)
    for side in (slice(None, few.border), slice(few.border, None)):
        ends = slice(None, whole.border) if side.start is None else slice(whole.border, None)
        assert max(few.measured[side]) == max(whole.measured[ends])


def test_views_of_several_parts_take_no_memory() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.out = nn.Linear(8, 24), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.wide(x).split(8, dim=-1)
            return self.out(torch.sigmoid(q) * k + v).mean()

    example = Split(), {"x": torch.randn(64, 8)}
    module, layout = made(example)
    measure.watched(module, example[1], layout.probe)
    memory = memory_of(layout, 0, None, "")
    assert np.abs(off_by(memory)).max() < 0.02


def test_the_plan_and_the_report_carry_it(small: Example) -> None:
    model, inputs = small
    work = fxopt.Train(batch=4, seq=24)
    opt = fxopt.optimize(model, fxopt.Budget(activations="85%"), inputs, workload=work)
    rows = {row.name: row for row in opt.plan.totals}
    memory = opt.plan.memory
    assert memory is not None
    assert memory is opt.report.memory
    assert memory.measured is not None
    assert memory.weights + max(memory.predicted) == rows["memory"].predicted
    assert memory.weights + max(memory.measured) == pytest.approx(rows["memory"].measured, rel=2e-3)
    gradients = sum(p.nbytes for p in model.parameters())
    assert memory.limit == pytest.approx(rows["activations"].limit + gradients)
    assert memory.limited_by == "activations"
    planned_only = fxopt.plan(model, fxopt.Budget(memory="1GiB"), inputs, workload=work).memory
    assert planned_only is not None
    assert planned_only.measured is None
    assert planned_only.limited_by == "memory"
    assert planned_only.limit == 2**30 - planned_only.weights


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 2000)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.body(x)).flatten(0, 1), labels.flatten())


def test_gradients_that_are_made_with_the_loss_are_gradients() -> None:
    inputs = {"x": torch.randn(8, 64, 16), "labels": torch.randint(2000, (8, 64))}
    opt = fxopt.optimize(
        Classifier(), fxopt.Budget(activations="60%"), inputs, workload=fxopt.Train(8, 64)
    )
    memory = opt.plan.memory
    assert memory is not None
    cut = next(p for p in memory.policies if p.rewrite == "activation.cut_cross_entropy")
    assert (cut.bytes, cut.waiting) == (8 * 64 * 2000 * 4, 0)
    assert memory.holders["gradients"][memory.border] > 4 * 16 * 2000
    assert max(memory.holders["outputs"]) < 100
    assert np.mean(np.abs(off_by(memory)) < 0.02) > 0.9


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_says_what_is_alive() -> None:
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.GELU())]
    model, x = nn.Sequential(*layers).cuda(), torch.randn(16, 512, 512, device="cuda")
    opt = fxopt.optimize(
        model, fxopt.Budget(activations="70%"), {"input": x}, workload=fxopt.Train(16, 512)
    )
    memory = opt.plan.memory
    assert memory is not None
    assert memory.measured is not None
    rows = {row.name: row for row in opt.plan.totals}
    measured = rows["memory"].measured
    print(opt.report)
    assert memory.weights + max(memory.measured) == pytest.approx(measured, rel=0.02)
    assert np.median(np.abs(off_by(memory))) < 0.02
