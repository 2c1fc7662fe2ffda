"""Derivatives in place of saved inputs: gradients, bytes, choice, plans, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

import fxopt
from fxopt.ir.cost import Cost, OpCall
from fxopt.ir.site import SavedInfo
from fxopt.passes.activation.approximate_backward import ApproximateBackward, derivative_pieces
from fxopt.passes.activation.packed_mask import PackedMask
from fxopt.passes.activation.pieces import Pieces
from fxopt.passes.activation.recompute import Recompute
from fxopt.training import measure
from fxopt.training.capture import joint
from fxopt.training.emit import executable, partition
from fxopt.training.forms import Choices
from fxopt.training.module import TrainingModule
from fxopt.training.schedule import schedule
from fxopt.training.search import StepPlan, frontier
from fxopt.training.sites import Saved, saved_tensors
from fxopt.training.step import Step

Example = tuple[nn.Module, dict[str, Any]]
FEW = "activation.approximate_backward"
MASK = "activation.packed_mask"
REWRITES: tuple[Any, ...] = (Recompute(), PackedMask(), ApproximateBackward())


def priced(call: OpCall) -> Cost:
    return Cost(1e-6 + 1e-9 * (call.bytes_read + call.bytes_written) + 1e-10 * call.flops)


def treated(
    example: Example, choose: Callable[[Saved], Choices]
) -> tuple[nn.Module, StepPlan, Saved]:
    """A module whose step does what `choose` says, the plan as counted, its sites."""
    found: list[Any] = []

    def plan_step(inner: nn.Module, batch: dict[str, Any]) -> Any:
        def cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            step = Step.of(graph.graph, count)
            with _disable_current_modes(), no_python_dispatcher():
                saved = saved_tensors(step, priced, REWRITES, fxopt.Train(1, 1), ())
            plan = StepPlan(choose(saved), frozenset()).counted(step, saved.seconds)
            found[:] = [plan, saved]
            return partition(graph, schedule(step, plan.dropped, (), plan.images), count)

        with joint(inner, batch) as traced:
            return traced.build(cut, executable)

    module = TrainingModule(example[0], plan_step)
    with measure.untouched(module):
        module(**example[1])
    return module, found[0], found[1]


def all_in(label: str) -> Callable[[Saved], Choices]:
    def choose(saved: Saved) -> Choices:
        return {o: f for o, forms in saved.forms.items() for f in forms if f.label == label}

    return choose


class Piecewise(torch.autograd.Function):
    """A function whose backward multiplies by the declared levels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, of: Tensor, pieces: Pieces) -> Tensor:
        ctx.save_for_backward(of)
        ctx.pieces = pieces
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        (of,) = ctx.saved_tensors
        levels, borders = (of.new_tensor(v) for v in (ctx.pieces.levels, ctx.pieces.borders))
        number = (of[..., None] > borders).sum(-1)
        return gradient * levels[number], None, None, None


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Any, ...]]] = {
    "gelu": (nn.functional.gelu, ("gelu_backward", 1, (), ())),
    "gelu tanh": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        ("gelu_backward", 1, (), (("approximate", "tanh"),)),
    ),
    "silu": (nn.functional.silu, ("silu_backward", 1, (), ())),
    "mish": (nn.functional.mish, ("mish_backward", 1, (), ())),
    "hardswish": (nn.functional.hardswish, ("hardswish_backward", 1, (), ())),
    "softplus": (nn.functional.softplus, ("softplus_backward", 1, (1.0, 20.0), ())),
    "elu": (nn.functional.elu, ("elu_backward", 5, (1.0, 1, 1, False), ())),
    "tanh": (torch.tanh, ("tanh_backward", 1, (), ())),
    "sigmoid": (torch.sigmoid, ("sigmoid_backward", 1, (), ())),
}


class Layers(nn.Module):
    """The function between linear layers; what follows it needs no result of it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 50).double(), nn.Linear(50, 24).double()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.function(h) + h.sin()).square().mean()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_the_declared_derivative(name: str, bits: int) -> None:
    function, described = FUNCTIONS[name]
    pieces = derivative_pieces(*described, bits)

    def declared(h: Tensor) -> Tensor:
        y = function(h.detach())
        return Piecewise.apply(h, y, y if name in ("tanh", "sigmoid") else h.detach(), pieces)

    class Two(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.function(self.up(x)).mul(1.5)).square().mean()

    model, x = Two(function).train(), 3 * torch.randn(5, 7, 24, dtype=torch.float64)
    module, plan, _ = treated((model, {"x": x}), all_in(f"{bits}-bit"))
    assert len(plan.images) == 1
    assert plan.error > 0
    model.function = declared
    expected = measure.outcome(model, {"x": x})
    name_, off = measure.outcome(module, {"x": x}).difference(expected)
    assert off < 1e-12, name_
    assert measure.peak(module, {"x": x}) == pytest.approx(plan.peak, rel=1e-4, abs=256)


class Sided(nn.Module):
    """Functions with a border or two, none of whose results a product of matrices reads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = ((24, 64), (64, 64), (64, 64), (64, 64))
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in sizes)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = self.layers
        x = self.drop(torch.relu(one(x)))
        x = self.drop(nn.functional.relu6(2 * two(x)))
        x = self.drop(nn.functional.leaky_relu(three(x), 0.2))
        x = four(x).relu_().transpose(0, 1)
        return x.sum((0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masks_are_eager_to_the_last_bit(dtype: torch.dtype) -> None:
    example = Sided(dtype).train(), {"x": torch.randn(8, 33, 24).to(dtype)}
    module, plan, saved = treated(
        example, lambda saved: {**all_in("1-bit")(saved), **all_in("2-bit")(saved)}
    )
    assert plan.error == 0
    kinds = [site.info.derivative for site in saved.sites.values() if site.info.derivative]  # pyright: ignore
    read = ["threshold", "hardtanh", "leaky_relu", "threshold"]
    assert [k.op.removesuffix("_backward") for k in kinds if k.op != "dropout_noise"] == read
    assert len(kinds) == len(plan.images) == 7
    outcome = measure.outcome(module, example[1])
    assert outcome.difference(measure.outcome(*example)) == ("", 0.0)
    assert measure.peak(module, example[1]) == pytest.approx(plan.peak, rel=1e-4, abs=256)


class Wide(nn.Module):
    """As a transformer's feed-forward layers: products that take long, GELU between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(192, 192) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x.square().mean()


def work(inputs: dict[str, Any]) -> fxopt.Train:
    first = next(iter(inputs.values()))
    return fxopt.Train(batch=first.shape[0], seq=first.shape[1])


@pytest.mark.slow
def test_a_budget_with_an_error_row_holds_and_replays(tmp_path: Path) -> None:
    model, inputs = Wide(), {"x": torch.randn(1024, 192)}
    budget = fxopt.Budget(activations="75%", relative_error=0.2)
    opt = fxopt.optimize(model, budget, inputs, workload=work(inputs), rewrites=[FEW])
    rows = {row.name: row for row in opt.plan.totals}
    assert opt.report.kept
    assert {d.rewrite for d in opt.plan.rewritten} == {FEW}
    assert rows["activations"].predicted == pytest.approx(rows["activations"].measured, rel=1e-4)
    error = measure.outcome(model.train(), inputs).gradient_error(measure.outcome(opt, inputs))
    assert rows["relative_error"].measured == pytest.approx(error)
    assert 0 < error <= 0.2
    assert 0.05 < rows["relative_error"].predicted / error < 20
    first = opt.plan.rewritten[0]
    assert first.label == f"{first.parameters['bits']}-bit"
    stored = fxopt.Plan.load(opt.plan.save(tmp_path / "plan.json"))
    replayed = fxopt.apply(model, stored, example_inputs=inputs)
    assert measure.peak(replayed, inputs) == measure.peak(opt, inputs)
    assert measure.outcome(replayed, inputs).difference(measure.outcome(opt, inputs)) == ("", 0.0)


def test_masks_are_chosen_without_an_error_row() -> None:
    layers = [layer for _ in range(3) for layer in (nn.Linear(96, 96), nn.ReLU(), nn.Dropout(0.2))]
    model, inputs = nn.Sequential(*layers, nn.Linear(96, 4)), {"input": torch.randn(512, 96)}
    budget = fxopt.Budget(activations="70%")
    opt = fxopt.optimize(model, budget, inputs, workload=work(inputs), rewrites=[MASK])
    assert opt.report.kept
    assert {d.rewrite for d in opt.plan.rewritten} == {MASK}
    assert "bit-equal" in opt.plan.notes[-1]
    reasons = {d.key: d.reason for d in opt.plan.decisions if not d.rewritten}
    assert "for more than the derivative" in reasons["2.mul"]
    with pytest.raises(fxopt.FxoptError, match=r"approximate_backward rounds.*relative_error"):
        fxopt.plan(model, budget, inputs, workload=work(inputs), rewrites=[FEW])


def test_second_runs_do_not_start_from_codes(small: Example) -> None:
    plans: list[StepPlan] = []

    def choose(saved: Saved) -> Choices:
        plans.extend(frontier(saved.step, saved.seconds, saved.droppable, saved.forms, error=0.5))
        return plans[-1].choices

    _, _, saved = treated(small, choose)
    assert any(plan.dropped and plan.images for plan in plans)
    for plan in plans:
        laid = schedule(saved.step, plan.dropped, plan.stops, plan.images)
        assert not laid.starts() & {o for o, form in plan.images.items() if form.image.replaces}


def test_a_plan_that_computes_again_from_codes_is_refused() -> None:
    model, inputs = Wide(), {"x": torch.randn(256, 192)}
    budget = fxopt.Budget(activations="110%", relative_error=0.5)
    plan = fxopt.plan(model, budget, inputs, workload=work(inputs))
    plan.find("layers.1.addmm").choose(FEW, "4-bit")
    plan.find("layers.1.gelu").choose("activation.recompute", "")
    with pytest.raises(fxopt.PlanError, match="or keeps but a derivative"):
        fxopt.apply(model, plan, example_inputs=inputs)


def test_what_more_than_a_derivative_reads_is_refused() -> None:
    _, _, saved = treated(
        (Layers(nn.functional.gelu).train(), {"x": torch.randn(64, 24).double()}), lambda _: {}
    )
    info = saved.sites["up.addmm"].info
    assert isinstance(info, SavedInfo)
    assert info.derivative is None
    reasons = {k: dict(r) for (_, k), r in saved.proposals.refused.items()}
    assert "for more than the derivative" in reasons["up.addmm"][FEW]
