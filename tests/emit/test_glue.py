"""Gates, norms and sums as one call: where they are joined, where not, and to which bits."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.decide.verify import peak_live_bytes
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from fxopt.ir.ops import gated
from tests.emit.test_packed_generation import captured


def emitted(model: nn.Module, inputs: dict[str, Any]) -> OptimizedModule:
    found = capture(model, inputs)
    return emit(found, GraphEditor(found), model)


class Gate(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate * self.scale, up * self.scale
        match self.kind:
            case "silu":
                return F.silu(gate) * up
            case "gelu":
                return up * F.gelu(gate)
            case "tanh":
                return F.gelu(gate, approximate="tanh") * up
            case "broadcast":
                return F.silu(gate) * up[:, :1]
            case "wide":
                return F.silu(gate) * up.double()
            case "read twice":
                active = F.silu(gate)
                return active * up + active
            case _:
                return F.relu(gate) * up


@pytest.mark.parametrize(
    ("kind", "joined"),
    [
        ("silu", '"silu"'), ("gelu", '"gelu"'), ("tanh", '"gelu_tanh"'),
        ("broadcast", ""), ("wide", ""), ("read twice", ""), ("relu", ""),
    ],
)  # fmt: skip
def test_only_a_gate_is_taken_for_one(kind: str, joined: str) -> None:
    model, inputs = Gate(kind).eval(), {"gate": torch.randn(3, 5, 6), "up": torch.randn(3, 5, 6)}
    opt = emitted(model, inputs)
    assert ("gated(" in opt.source) is bool(joined)
    assert joined in opt.source
    assert torch.equal(opt(**inputs), model(**inputs))


class Layer(nn.Module):
    """A sum and its norm, which some caller's sum and another module's norm can be as well."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(8, 1e-6) if kind == "rounded once" else Norm(kind)
        self.down = nn.Linear(8, 8)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        match self.kind:
            case "scaled":
                total = torch.add(x, down, alpha=2)
            case "broadcast":
                total = x + down[:1]
            case _:
                total = x + down
        return total + self.down(self.norm(total))


class Norm(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        if self.kind == "read twice":
            return self.weight * normed + normed
        return self.weight * normed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "joined"),
    [
        ("plain", "add_rms_norm"), ("scaled", "rms_norm"), ("broadcast", "rms_norm"),
        ("read twice", ""), ("rounded once", ""),
    ],
)  # fmt: skip
def test_a_sum_and_its_norm(kind: str, joined: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Layer(kind, dtype).eval(), torch.randn(3, 5, 8).to(dtype)
    opt = emitted(model, {"x": x})
    if dtype == torch.bfloat16:
        calls = re.findall(r"(?<![.\w])((?:add_)?rms_norm)\(", opt.source)
        assert calls == [joined] * bool(joined)
    assert torch.equal(opt(x), model(x))


@pytest.mark.parametrize(
    ("name", "sums", "norms"), [("llama", 1, 2), ("qwen3", 1, 4), ("gemma3", 0, 0)]
)
def test_models_of_half_precision(name: str, sums: int, norms: int) -> None:
    """A sum at the end of a layer stays there, so that layers are still one loop."""
    model, found = captured(name, torch.bfloat16)
    source = emit(found, GraphEditor(found), model).source
    assert source.count(" = add_rms_norm(") == sums
    assert source.count(" rms_norm(") == norms
    assert source.count("gated(") == 1
    assert ("for layer, state in zip(self.layers, past" in source) is bool(sums)


@torch.no_grad()
def test_a_gate_holds_no_more_than_the_two_calls_did() -> None:
    gate, up = nn.Linear(4, 4096), nn.Linear(4, 4096)
    x = torch.randn(64, 4)

    def joined() -> Tensor:
        left, right = gate(x), up(x)  # a caller that holds them
        return gated(left, right, "silu")

    size = joined().nbytes
    assert peak_live_bytes(joined, x.device) < 3.1 * size


def test_gates_of_two_dtypes_are_promoted() -> None:
    """As under autocast, which the graph knows nothing of."""
    gate, up = torch.randn(3, 6).bfloat16(), torch.randn(3, 6)
    assert torch.equal(gated(gate, up, "silu"), F.silu(gate) * up)


class Looped(nn.Module):
    """One norm and one layer, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(x + self.linear(x))
        return x


def test_a_norm_that_is_called_again_reads_its_weight_in_order() -> None:
    model, x = Looped().eval(), torch.randn(2, 5, 64)
    opt = emitted(model, {"x": x})
    assert opt.source.count("add_rms_norm(") == 3
    opt.program.graph.lint()
    again = copy.deepcopy(opt)
    torch.testing.assert_close(again(x), model(x))
