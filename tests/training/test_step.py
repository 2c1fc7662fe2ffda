"""Whatever is computed again, a step leaves what eager leaves, bit for bit, and as many bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.ir.errors import CaptureError
from fxopt.training import measure
from fxopt.training.capture import joint
from fxopt.training.emit import executable, partition
from fxopt.training.module import TrainingModule
from fxopt.training.pricing import op_call
from fxopt.training.schedule import schedule
from fxopt.training.step import Step

Example = tuple[nn.Module, dict[str, Any]]


def dropping(model: nn.Module, inputs: dict[str, Any], share: float) -> tuple[nn.Module, int, int]:
    """A module that computes a random share of its saved tensors again; its predicted peak, and
    how many ops run twice."""
    found: dict[str, int] = {}

    def plan_step(inner: nn.Module, batch: dict[str, Any]) -> Any:
        def cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            step = Step.of(graph.graph, count)
            dropped = [o for o in step.saved if random.random() < share]
            laid = schedule(step, [o for o in dropped if step.blocked(step.maker(o)) is None])
            found.update(peak=int(laid.live().max()), again=len(laid.runs_again()))
            return partition(graph, laid, count)

        with joint(inner, batch) as traced:
            return traced.build(cut, executable)

    module = TrainingModule(model, plan_step)
    with measure.untouched(module):
        module(**inputs)
    return module, found["peak"], found["again"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_bits_and_bytes(example: Example, share: float) -> None:
    model, inputs = example
    eager = measure.outcome(model, inputs)
    module, peak, again = dropping(model, inputs, share)
    assert bool(again) == bool(share)
    assert measure.outcome(module, inputs).difference(eager) == ("", 0.0)
    assert measure.peak(module, inputs) == pytest.approx(peak, rel=1e-4, abs=128)


def test_outcomes_are_told_apart(small: Example) -> None:
    model, inputs = small
    first = measure.outcome(model, inputs)
    with torch.no_grad():
        model.get_parameter("mix.bias")[0] += 1e-3
    name, off = measure.outcome(model, inputs).difference(first)
    assert name
    assert 0 < off < 1


def test_what_is_complex_or_of_another_shape_differs() -> None:
    def one(tensor: torch.Tensor) -> measure.Outcome:
        return measure.Outcome({"output y": tensor})

    y = torch.tensor([3.0 + 4.0j, 0.0])
    assert one(y).difference(one(y.conj())) == ("output y", pytest.approx(8 / 5))
    x = torch.ones(2, 3)
    assert one(x).difference(one(x.T)) == ("output y", float("inf"))
    assert one(x).gradient_error(one(x)) == 0.0  # there is none


def test_a_gradient_of_rounding_alone_is_no_difference() -> None:
    large = torch.tensor([1.0, -2.0])
    first = measure.Outcome({"gradient of a": large, "gradient of b": torch.tensor([3e-10])})
    second = measure.Outcome({"gradient of a": large, "gradient of b": torch.tensor([-2e-10])})
    assert 0 < first.difference(second)[1] < 1e-2
    third = measure.Outcome({"gradient of a": large, "gradient of b": torch.tensor([1e-3])})
    assert third.difference(second) == ("gradient of b", pytest.approx(1.0))


def test_what_is_undefined_in_one_step_alone_differs() -> None:
    values = torch.tensor([1.0, float("inf"), float("nan"), 2.0])
    other = torch.tensor([1.0, float("inf"), float("nan"), float("nan")])
    first, second = (measure.Outcome({"gradient of a": v}) for v in (values, other))
    assert first.difference(measure.Outcome({"gradient of a": values.clone()})) == ("", 0.0)
    assert first.difference(second) == ("gradient of a", float("inf"))
    assert first.gradient_error(second) == float("inf")


def test_batch_statistics_move_once(conv: Example) -> None:
    model, inputs = conv
    module, _, again = dropping(model, inputs, 1.0)
    assert again
    before = model.get_buffer("first.1.running_mean").clone()
    measure.step(module, inputs)
    moved = model.get_buffer("first.1.running_mean").clone()
    with torch.no_grad():
        batch_mean = model.first[0](inputs["pixels"]).mean((0, 2, 3))  # pyright: ignore
    torch.testing.assert_close(moved, 0.9 * before + 0.1 * batch_mean)
    assert int(model.get_buffer("first.1.num_batches_tracked")) == 1


def test_dropout_differs_from_step_to_step(small: Example) -> None:
    model, inputs = small
    module, _, _ = dropping(model, inputs, 1.0)
    losses = [float(module(**inputs).sum().detach()) for _ in range(3)]
    assert len(set(losses)) == 3


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), r"Branching: the training step cannot be traced.*[Vv]alues that decide"),
        (Frozen(), r"Frozen: no output needs a gradient.*frozen"),
    ],
)
def test_what_cannot_be_traced_is_said(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message), joint(model, {"x": torch.ones(2, 3)}):
        pass


def test_tracing_leaves_the_model_and_transformers_alone(small: Example) -> None:
    masks = pytest.importorskip("transformers.masking_utils")
    before = (masks.is_tracing, masks.find_packed_sequence_indices)
    model, inputs = small
    state = torch.get_rng_state()
    with joint(model, inputs) as traced:
        assert traced.graph.graph.find_nodes(op="output")
    assert torch.equal(torch.get_rng_state(), state)
    assert (masks.is_tracing, masks.find_packed_sequence_indices) == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_attention_of_grouped_heads_is_counted() -> None:
    """PyTorch's own counter asks for as many heads of keys as of queries."""
    graph = fx.Graph()
    target = torch.ops.aten._scaled_dot_product_flash_attention.default
    inputs = [graph.placeholder(name) for name in "qkv"]
    for node, (heads, length) in zip(inputs, ((8, 10), (2, 12), (2, 12)), strict=True):
        node.meta["val"] = torch.empty(3, heads, length, 16, device="meta")
    call = graph.call_function(target, tuple(inputs))
    call.meta["val"] = [torch.empty(3, 8, 10, 16, device="meta")]
    assert op_call(call).flops == 2 * 3 * 8 * 10 * 12 * (16 + 16)
