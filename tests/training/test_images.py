"""Saved tensors that wait in another form: what the backward reads, bytes, choice, plans."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

import fxopt
from fxopt.ir.cost import Cost, OpCall
from fxopt.ir.rewrite import Match, Refusal
from fxopt.ir.saved import AGAIN
from fxopt.ir.site import SavedInfo, Site
from fxopt.kernels.pack_activation import pack_activation, unpack_activation
from fxopt.passes.activation.approximate_backward import ApproximateBackward
from fxopt.passes.activation.offload import Offload
from fxopt.passes.activation.packed_mask import PackedMask
from fxopt.passes.activation.quantized_offload import QuantizedOffload
from fxopt.passes.activation.quantized_saved import QuantizedSaved
from fxopt.passes.activation.recompute import Recompute
from fxopt.passes.activation.shared_norm import SharedNorm
from fxopt.training import measure
from fxopt.training.capture import joint
from fxopt.training.emit import executable, partition
from fxopt.training.forms import Choices, Form, again, images
from fxopt.training.module import TrainingModule
from fxopt.training.schedule import schedule
from fxopt.training.search import StepPlan, frontier
from fxopt.training.sites import Saved, saved_tensors
from fxopt.training.step import Step
from tests.crossed import first

Example = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Anywhere(Offload):
    """Offloads on a CPU as well, where it frees nothing: what is counted and run is the same."""

    least: int = 0

    def match(self, site: Site) -> Match | Refusal:
        assert isinstance(site.info, SavedInfo)
        return Match(site) if site.info.whole else Refusal("not whole")


@dataclass(frozen=True)
class RoundedAnywhere(QuantizedOffload):
    """The same, of codes."""

    @property
    def _host(self) -> Offload:
        return Anywhere()


REWRITES: tuple[Any, ...] = (
    Recompute(), Anywhere(), PackedMask(), ApproximateBackward(), QuantizedSaved(),
    RoundedAnywhere(), SharedNorm(),
)  # fmt: skip


def priced(call: OpCall) -> Cost:
    """As on a device on which arithmetic counts."""
    return Cost(1e-6 + 1e-9 * (call.bytes_read + call.bytes_written) + 1e-10 * call.flops)


def saved_of(step: Step, model: nn.Module | None = None) -> Saved:
    weights = dict(model.named_parameters()) if model else None
    with _disable_current_modes(), no_python_dispatcher():
        return saved_tensors(step, priced, REWRITES, fxopt.Train(1, 1), (), weights=weights)


def treated(example: Example, choose: Any) -> tuple[nn.Module, StepPlan, Saved]:
    """A module whose step does what `choose(saved)` says, the plan as counted, its sites."""
    found: list[Any] = []

    def plan_step(inner: nn.Module, batch: dict[str, Any]) -> Any:
        def cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            step = Step.of(graph.graph, count)
            saved = saved_of(step, inner)
            plan = StepPlan(choose(saved), frozenset()).counted(step, saved.seconds)
            found[:] = [plan, saved]
            return partition(graph, schedule(step, plan.dropped, (), plan.images), count)

        with joint(inner, batch) as traced:
            return traced.build(cut, executable)

    module = TrainingModule(example[0], plan_step)
    with measure.untouched(module):
        module(**example[1])
    return module, found[0], found[1]


def taken_apart(example: Example) -> Step:
    """The step of a model, its graph as it was traced."""
    found: list[Step] = []

    def cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        found.append(Step.of(graph.graph, count))
        return partition(fx.GraphModule(graph, graph.graph), schedule(found[0], ()), count)

    with joint(*example) as traced:
        traced.build(cut, executable)
    return found[0]


def at_random(saved: Saved) -> Choices:
    """Any treatment of any tensor, but nothing computed again from what was rounded."""
    choices: dict[fx.Node, Any] = {}
    for owner in random.sample(list(saved.offers), len(saved.offers)):
        offered = [offer.treatment for offer in saved.offers[owner]]
        forms = [treatment for treatment in offered if isinstance(treatment, Form)]
        # however many forms there are
        kinds = [None, *(t for t in offered if t == AGAIN), *random.sample(forms, bool(forms))]
        trial = {**choices, owner: random.choice(kinds)}
        trial = {o: t for o, t in trial.items() if t is not None}
        laid = schedule(saved.step, again(trial), (), images(trial))
        if not laid.starts() & {o for o, form in images(trial).items() if not form.restores}:
            choices = trial
    return choices


@pytest.mark.parametrize("_", first(range(2)))
def test_bytes_and_an_exact_forward(example: Example, _: int) -> None:
    eager = measure.outcome(*example)
    module, plan, _saved = treated(example, at_random)
    assert plan.images
    outcome = measure.outcome(module, example[1])
    assert outcome.difference(eager, gradients=False) == ("", 0.0)
    error = eager.gradient_error(outcome)
    # int4 rounds to a tenth, and gradients pass several tensors; dropout's noise has two values,
    # which come back as they were
    assert error < (0.5 if plan.error else 1e-30)
    # a second batch norm returns less than the first: no running statistics
    assert measure.peak(module, example[1]) == pytest.approx(plan.peak, rel=1e-4, abs=256)


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 50, dtype=dtype), nn.Linear(50, 24, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)).sin()).square().mean()


def all_in(label: str) -> Any:
    def choose(saved: Saved) -> Choices:
        return {o: f for o, forms in saved.forms.items() for f in forms if f.label == label}

    return choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_hooks_that_round(bits: int, dtype: torch.dtype) -> None:
    """PyTorch's own hooks on saved tensors as the other way to the same numbers."""
    model, x = Layers(dtype).train(), torch.randn(37, 24).to(dtype)
    module, plan, saved = treated((model, {"x": x}), all_in(f"int{bits}"))
    assert len(plan.images) == len(saved.step.saved)
    kept = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}

    def pack(t: Tensor) -> Any:
        if t.untyped_storage().data_ptr() in kept or t.dim() == 0:
            return t
        return *pack_activation(t, bits, 128), t.shape, t.stride()

    def unpack(stored: Any) -> Tensor:
        return stored if isinstance(stored, Tensor) else unpack_activation(*stored, bits, 128)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model(x).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    module(x).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)


def test_results_that_are_not_taken_yet_count_beside_a_workspace() -> None:
    """Codes are made between an op that returns several tensors and what takes them."""
    layers = [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 1)]
    example = nn.Sequential(*layers).train(), {"input": torch.randn(64, 1, 16, 16)}

    def choose(saved: Saved) -> Choices:
        return {o: f for o, f in all_in("int4")(saved).items() if "relu" in o.name}

    module, plan, saved = treated(example, choose)
    widest = saved.step.forward[int(schedule(saved.step, (), (), plan.images).live().argmax())]
    assert widest.name == "getitem"
    assert measure.peak(module, example[1]) == pytest.approx(plan.peak, rel=1e-4)


@pytest.mark.parametrize("label", first(["host0", "host"]))
def test_offloaded_steps_are_eager_ones(example: Example, label: str) -> None:
    eager = measure.outcome(*example)
    module, plan, _ = treated(example, all_in(label))
    assert len(plan.images) > 3
    assert plan.error == 0
    assert measure.outcome(module, example[1]).difference(eager) == ("", 0.0)
    assert measure.peak(module, example[1]) == pytest.approx(plan.peak, rel=1e-4, abs=128)


def test_codes_in_host_memory_are_those_that_would_stay(example: Example) -> None:
    """The gradients of `quantized_saved` to the bit, and every byte of the way is counted."""
    there, plan, saved = treated(example, all_in("int8-host"))
    here, other, _ = treated(example, all_in("int8"))
    assert len(plan.images) == len(other.images) > 3
    assert plan.error == other.error > 0
    outcome = measure.outcome(there, example[1])
    assert outcome.difference(measure.outcome(here, example[1])) == ("", 0.0)
    assert outcome.gradient_error(measure.outcome(*example)) > 0
    assert measure.peak(there, example[1]) == pytest.approx(plan.peak, rel=1e-4, abs=256)
    laid = schedule(saved.step, (), (), plan.images)
    owner = next(iter(plan.images))
    kinds = [item.kind for item in laid.items if item.node is owner and item.kind != "run"]
    assert kinds == ["pack", "send", "release", "fetch", "arrive", "unpack"]


@pytest.mark.parametrize("label", ["int8", "host", "int8-host"])
def test_graphs_are_kept_and_accumulate(label: str) -> None:
    model, x = Layers().train(), torch.randn(37, 24)
    module, _, _ = treated((model, {"x": x}), all_in(label))
    loss = module(x)
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])


@pytest.mark.slow
def test_smaller_budgets_bring_smaller_peaks(small: Example) -> None:
    plans: list[list[StepPlan]] = []

    def choose(saved: Saved) -> Choices:
        for error in (0.0, 0.004, 0.1):
            found = frontier(saved.step, saved.seconds, saved.droppable, saved.forms, error=error)
            plans.append(found)
        return plans[-1][-1].choices

    _, _, saved = treated(small, choose)
    exact, some, free = plans
    assert not any(form.error for plan in exact for form in plan.images.values())
    assert free[-1].peak < exact[-1].peak
    assert any(plan.dropped and plan.images for plan in free)
    for limit, found in zip((0.0, 0.004, 0.1), plans, strict=True):
        for large, lower in itertools.pairwise(found):
            assert lower.peak < large.peak
            assert lower.seconds >= large.seconds
        for plan in found:
            assert plan.error <= limit * (1 + 1e-9)
            assert plan == plan.counted(saved.step, saved.seconds)
            laid = schedule(saved.step, plan.dropped, plan.stops, plan.images)
            assert not laid.starts() & {o for o, form in plan.images.items() if not form.restores}
    assert any(plan.images for plan in some)


class Expensive(nn.Module):
    """Products of matrices that take long to run again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def work(inputs: dict[str, Any]) -> fxopt.Train:
    first = next(iter(inputs.values()))
    return fxopt.Train(batch=first.shape[0], seq=first.shape[1])


ROUNDED = "activation.quantized_saved"


def test_a_budget_with_an_error_row_holds_as_measured(tmp_path: Path) -> None:
    model, inputs = Expensive(), {"x": torch.randn(1024, 256)}
    budget = fxopt.Budget(activations="75%", relative_error=0.02)
    opt = fxopt.optimize(model, budget, inputs, workload=work(inputs), rewrites=[ROUNDED])
    rows = {row.name: row for row in opt.plan.totals}
    assert opt.report.kept
    assert {d.rewrite for d in opt.plan.rewritten} == {ROUNDED}
    assert rows["activations"].predicted == pytest.approx(rows["activations"].measured, rel=1e-4)
    error = measure.outcome(model.train(), inputs).gradient_error(measure.outcome(opt, inputs))
    assert rows["relative_error"].measured == pytest.approx(error)
    assert 0 < error <= 0.02
    assert 0.05 < rows["relative_error"].predicted / error < 20
    assert "rounded tensors" in opt.plan.notes[-1]
    first = opt.plan.rewritten[0]
    assert "saved in place of" in first.reason
    assert first.error > 0
    assert first.parameters == {"bits": int(first.label[3:]), "group_size": 128}
    assert ROUNDED in str(opt.plan)
    stored = fxopt.Plan.load(opt.plan.save(tmp_path / "plan.json"))
    replayed = fxopt.apply(model, stored, example_inputs=inputs)
    assert [(d.key, d.rewrite, d.label) for d in replayed.plan.rewritten] == [
        (d.key, d.rewrite, d.label) for d in opt.plan.rewritten
    ]
    assert measure.peak(replayed, inputs) == measure.peak(opt, inputs)
    assert measure.outcome(replayed, inputs).difference(measure.outcome(opt, inputs)) == ("", 0.0)


@pytest.mark.slow
def test_what_errs_too_much_is_replaced_or_refused() -> None:
    model, inputs = Expensive(), {"x": torch.randn(1024, 256)}
    tight = fxopt.Budget(activations="75%", relative_error=1e-7)
    both = fxopt.optimize(model, tight, inputs, workload=work(inputs))
    assert both.report.kept
    assert {d.rewrite for d in both.plan.rewritten} == {"activation.recompute"}
    with pytest.raises(fxopt.BudgetError, match="no plan keeps activations"):
        fxopt.optimize(model, tight, inputs, workload=work(inputs), rewrites=[ROUNDED])


def test_a_prior_that_is_wrong_is_corrected_by_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = Expensive(), {"x": torch.randn(1024, 256)}
    budget = fxopt.Budget(activations="75%", relative_error=0.02)
    original = QuantizedSaved.apply

    def wrong(factor: float) -> None:
        def apply(self: Any, match: Any, candidate: Any, tensors: Any, editor: Any) -> None:
            original(self, match, candidate, tensors, editor)
            meta = editor.node(match.site).meta
            meta["fxopt_saved"] = replace(
                meta["fxopt_saved"], rounding=factor * meta["fxopt_saved"].rounding
            )

        monkeypatch.setattr(QuantizedSaved, "apply", apply)

    for factor in (1e-3, 1e2):
        wrong(factor)
        opt = fxopt.optimize(model, budget, inputs, workload=work(inputs), rewrites=[ROUNDED])
        assert opt.report.kept
        row = next(row for row in opt.plan.totals if row.name == "relative_error")
        assert row.measured <= 0.02


def test_without_an_error_row_nothing_is_rounded(small: Example) -> None:
    model, inputs = small
    plan = fxopt.plan(model, fxopt.Budget(activations="80%"), inputs, workload=work(inputs))
    assert {d.rewrite for d in plan.rewritten} <= {"activation.recompute", "activation.packed_mask"}
    lossy = {ROUNDED, "activation.approximate_backward"}
    assert not any(a.rewrite in lossy for d in plan.decisions for a in d.alternatives)
    with pytest.raises(fxopt.FxoptError, match=r"quantized_saved rounds.*relative_error=0.01"):
        fxopt.plan(
            model, fxopt.Budget(activations="80%"), inputs, workload=work(inputs),
            rewrites=[ROUNDED],
        )  # fmt: skip
    with pytest.raises(fxopt.FxoptError, match=r"relative_error: .* keep a byte row"):
        fxopt.plan(model, fxopt.Budget(relative_error=0.1), inputs, workload=work(inputs))


def test_refusals_say_why(example: Example) -> None:
    _, _, saved = treated(example, lambda _: {})
    refused = {
        key: reason
        for (_, key), reasons in saved.proposals.refused.items()
        for name, reason in reasons
        if name == ROUNDED
    }
    for key, owner in saved.owners.items():
        labels = [f.label for f in saved.forms.get(owner, ())]
        value = owner.meta["val"]
        if not value.is_floating_point():
            assert "do not round" in refused[key]
        elif value.nbytes > 4096 and key not in refused:
            assert [label for label in labels if "-bit" not in label and label != "shared"] == [
                "host", "host1", "host0", "int8", "int4",
                "int8-host", "int8-host1", "int8-host0",
            ]  # fmt: skip
    assert saved.forms


class Mixed(nn.Module):
    """A saved mask, statistics, and a tensor that is part of a larger memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        x = x.masked_fill(x > 1, 0.5) * torch.exp(x[:1, :1])
        return x.square().mean()


def test_what_does_not_round_is_refused() -> None:
    _, _, saved = treated((Mixed().train(), {"x": torch.randn(256, 64)}), lambda _: {})
    reasons = {k: dict(r).get(ROUNDED, "") for (_, k), r in saved.proposals.refused.items()}
    assert "do not round" in reasons["norm.gt"]
    assert "statistic" in reasons["norm.native_layer_norm.1"]
    assert "no less than" in reasons["exp"]


def test_second_runs_do_not_start_from_rounded_memory(small: Example) -> None:
    model, inputs = small
    budget = fxopt.Budget(activations="95%", relative_error=0.5)
    plan = fxopt.plan(model, budget, inputs, workload=work(inputs))
    for decision in plan.decisions:
        options = [(decision.rewrite, decision.label)]
        options += [(a.rewrite, a.label) for a in decision.alternatives]
        for wanted in (("activation.recompute", ""), (ROUNDED, "int8")):
            if wanted in options and "linear" not in decision.key and "mm" not in decision.key:
                decision.choose(*wanted)
                break
        else:
            if (ROUNDED, "int8") in options:
                decision.choose(ROUNDED, "int8")
    with pytest.raises(fxopt.PlanError, match="computes other tensors again"):
        fxopt.apply(model, plan, example_inputs=inputs)


def test_forms_are_told_apart_from_second_runs() -> None:
    _, plan, _ = treated((Layers().train(), {"x": torch.randn(37, 24)}), all_in("int4"))
    assert not again(plan.choices)
    assert all(isinstance(form, Form) and form != AGAIN for form in plan.choices.values())
