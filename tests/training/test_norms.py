"""Inputs of norms that are made again of their outputs: what is found, gradients, bytes, plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt.training import measure
from fxopt.training.forms import Choices, Form
from fxopt.training.planned import _check_starts  # pyright: ignore[reportPrivateUsage]
from fxopt.training.search import StepPlan, frontier
from fxopt.training.sites import Saved
from tests.training.conftest import Example, gpt2, llama, vit
from tests.training.test_images import all_in, taken_apart, treated

SHARED = "activation.shared_norm"


class WrittenOut(nn.Module):
    """RMSNorm as Llama has it: in float32, the weight last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """A norm that two layers read, behind something nonlinear and before a residual."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(20, 24), norm(24)
        self.left, self.right = nn.Linear(24, 24), nn.Linear(24, 24)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(x)
        return (x + self.left(y) * self.right(y)).square().mean()


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "no bias": lambda n: nn.LayerNorm(n, bias=False),
    "bare": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "rms": nn.RMSNorm,
    "written out": WrittenOut,
}


def block(kind: str, dtype: torch.dtype = torch.float32) -> Example:
    return Block(NORMS[kind]).to(dtype).train(), {"x": torch.randn(7, 9, 20).to(dtype)}


def shared(saved: Saved) -> Choices:
    return all_in("shared")(saved)


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_are_those_of_float64(kind: str) -> None:
    """In float32 dividing back costs a few roundings; nothing of the input is saved."""
    example = block(kind)
    module, plan, _ = treated(example, shared)
    assert plan.images
    mine = measure.outcome(module, example[1])
    eager = measure.outcome(*example)
    assert mine.difference(eager, gradients=False) == ("", 0.0)
    wide = measure.outcome(example[0].double(), {"x": example[1]["x"].double()})
    truth = {n: t for n, t in wide.tensors.items() if n.startswith(measure.GRADIENT)}
    assert truth
    for name, expected in truth.items():
        torch.testing.assert_close(mine.tensors[name].double(), expected, rtol=1e-4, atol=1e-6)
    assert 0 < mine.gradient_error(eager) < 1e-5


@pytest.mark.parametrize("kind", NORMS)
def test_weights_may_shrink_after_planning(kind: str) -> None:
    """As in training, or when a checkpoint is loaded: no channel loses its gradient."""
    example = block(kind)
    module, plan, _ = treated(example, shared)
    assert plan.images
    with torch.no_grad():
        for name, parameter in example[0].named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(0.1)
    mine = measure.outcome(module, example[1])
    assert mine.gradient_error(measure.outcome(*example)) < 1e-4


@pytest.mark.parametrize("kind", NORMS)
def test_a_wrong_input_would_be_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward does read what is made."""
    from fxopt.passes.activation import shared_norm

    example = block(kind)
    monkeypatch.setattr(shared_norm, "NEARER", 1e-3)  # all weights count as 0
    module, _, _ = treated(example, shared)
    error = measure.outcome(*example).gradient_error(measure.outcome(module, example[1]))
    assert error > 1e-3 or kind == "bare"


@pytest.mark.parametrize("kind", NORMS)
def test_in_16_bits_the_error_is_that_of_the_output(kind: str) -> None:
    example = block(kind, torch.bfloat16)
    module, plan, _ = treated(example, shared)
    assert plan.images
    error = measure.outcome(*example).gradient_error(measure.outcome(module, example[1]))
    assert 0 < error < 0.02


@pytest.mark.parametrize("make", [llama, vit, gpt2])
def test_under_autocast_bytes_are_as_counted(make: Callable[[], Example]) -> None:
    """Of each norm the output waits in 16 bits, or as codes of these, and nothing else."""
    model, inputs = make()
    example = model.train(), inputs

    def with_codes(saved: Saved) -> Choices:
        return {**all_in("int8")(saved), **shared(saved)}

    with torch.autocast("cpu", torch.bfloat16):
        for choose in (shared, with_codes):
            module, plan, saved = treated(example, choose)
            made = [f for f in plan.images.values() if f.image.shares]
            assert len(made) >= 4
            assert {m.output.meta["val"].dtype for m in saved.step.shared.values()} == {
                torch.bfloat16
            }
            eager, mine = measure.outcome(*example), measure.outcome(module, example[1])
            assert eager.difference(mine, gradients=False) == ("", 0.0)
            assert 0 < eager.gradient_error(mine) < 0.05
            assert measure.peak(module, example[1]) == pytest.approx(plan.peak, rel=1e-4, abs=256)


def test_casts_of_one_tensor_are_one() -> None:
    """Eager saves the norm's output in 16 bits once a layer that reads it."""

    class Wide(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x).float())
            return (self.left(y) * self.right(y)).square().mean()

    example = Wide(nn.LayerNorm).train(), {"x": torch.randn(7, 9, 20)}
    with torch.autocast("cpu", torch.bfloat16):
        step = taken_apart(example)
        cast = torch.ops.aten._to_copy.default
        norm = next(n for n in step.forward if n.target is torch.ops.aten.native_layer_norm.default)
        output = next(part for part in norm.users if part.args[1] == 0)
        made = [output, *output.users, *(u for user in output.users for u in user.users)]
        assert [node.target for node in made].count(cast) == 1
        module, plan, _ = treated(example, lambda saved: {})
        eager = measure.outcome(*example)
        assert eager.difference(measure.outcome(module, example[1])) == ("", 0.0)
        assert plan.peak < measure.peak(*example)


def offers_of(example: Example) -> list[Form]:
    _, _, saved = treated(example, lambda saved: {})
    return [f for forms in saved.forms.values() for f in forms if f.image.shares]


def test_a_weight_near_zero_is_refused_with_its_number() -> None:
    model, inputs = block("layer")
    assert len(offers_of((model, inputs))) == 1
    with torch.no_grad():
        model.norm.weight[3] = 0.01
    _, _, saved = treated((model, inputs), lambda saved: {})
    reasons = [
        r for found in saved.proposals.refused.values() for name, r in found if name == SHARED
    ]
    assert any("divided by a weight of 0.01, where weight and bias reach" in r for r in reasons)
    with torch.no_grad():
        model.norm.weight[3] = 0.0
    assert not offers_of((model, inputs))


def test_only_what_follows_from_a_saved_output_is_offered() -> None:
    model, inputs = block("layer")
    assert offers_of((model, inputs))

    class Gelu(Block):
        """The output is read for a derivative alone, which may be saved in its place."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(self.norm(self.first(x))).sum()

    assert not offers_of((Gelu(nn.LayerNorm).train(), inputs))

    class Scaled(nn.Module):
        """Divides by a weight that is computed, and would have to be saved."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(20, 24), WrittenOut(24), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.norm.weight)
            return self.last(x).sum()

    assert not offers_of((Scaled().train(), inputs))


def test_nothing_runs_again_from_what_is_made() -> None:
    """Neither does the output that it is made of: each would wait for the other."""
    model, inputs = block("layer")

    def choose(saved: Saved) -> Choices:
        found: dict[fx.Node, Any] = dict(shared(saved))
        (owner,) = found
        output = saved.step.shared[owner].output
        plan = StepPlan({**found, output: "again"}, frozenset())
        with pytest.raises(fxopt.PlanError, match="rounds"):
            _check_starts(saved, plan)
        _check_starts(saved, StepPlan(found, frozenset()))
        return found

    treated((model, inputs), choose)


def test_a_search_takes_it_under_autocast() -> None:
    model, inputs = llama()
    found: list[StepPlan] = []

    def choose(saved: Saved) -> Choices:
        limits = {"error": 0.005, "deadline": 0.0}
        found[:] = frontier(saved.step, saved.seconds, saved.droppable, saved.forms, **limits)
        return {}

    with torch.autocast("cpu", torch.bfloat16):
        treated((model.train(), inputs), choose)
    assert any(form.image.shares for plan in found for form in plan.images.values())
