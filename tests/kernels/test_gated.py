"""Gated units in one kernel: no further from float64 than the calls that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.ir.ops import gated as called
from fxopt.kernels.gated import REFERENCE, gated

pytest.importorskip("triton")

from fxopt.kernels.gated.triton import gated_forward
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
# The interpreter has no bfloat16 of its own.
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def draw(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    gate, up = (4 * torch.randn(*shape, device=DEVICE) for _ in range(2))
    return gate.to(dtype), up.to(dtype)


def errors(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> tuple[float, float]:
    """Root mean square errors of `out` and of the calls against float64."""
    exact = REFERENCE(gate.double(), up.double(), activation)
    calls = REFERENCE(gate, up, activation)
    return tuple(float((x.double() - exact).square().mean().sqrt()) for x in (out, calls))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(2, 5, 63), (1, 1, 1025), (7, 500), (33,)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_close_as_the_calls(activation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = draw(dtype, *shape)
    out = gated_forward(gate, up, activation)
    assert out.is_contiguous()
    assert out.dtype == dtype
    ours, theirs = errors(gate, up, activation, out)
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(activation: str) -> None:
    gate = torch.tensor([-6e4, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 6e4], device=DEVICE).half()
    out = gated_forward(gate, torch.ones_like(gate), activation)
    expected = REFERENCE(gate.float(), torch.ones_like(gate).float(), activation).half()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_product_are_read_where_they_lie(activation: str) -> None:
    gate, up = draw(torch.float16, 2, 3, 130)[0].chunk(2, -1)
    out = gated_forward(gate, up, activation)
    assert torch.equal(out, gated_forward(gate.contiguous(), up.contiguous(), activation))
    turned = gate.transpose(0, 2), up.transpose(0, 2)
    assert torch.equal(gated_forward(*turned, activation), out.transpose(0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator(activation: str, dtype: torch.dtype) -> None:
    gate, up = draw(dtype, 2, 3, 20)
    torch.library.opcheck(gated, (gate, up, activation))


def test_other_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="activation must be silu, gelu or gelu_tanh, got 'relu'"):
        gated(torch.ones(3), torch.ones(3), "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_flow_where_they_are_needed(activation: str) -> None:
    x = [t.double().requires_grad_() for t in draw(torch.float64, 2, 5)]
    assert torch.autograd.gradcheck(lambda gate, up: called(gate, up, activation), x)


COMPILE = """
import triton.language as tl
from fxopt.kernels.gated.triton import _gated_kernel as kernel
from tests.kernels.ahead_of_time import build

for activation in ("silu", "gelu", "gelu_tanh"):
    constants = dict(ACTIVATION=activation, BLOCK=1024)
    pointers = dict(gate="*bf16", up="*bf16", out="*bf16")
    assert build(kernel, pointers, **constants).asm["cubin"]
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    compiled(COMPILE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 1, 14336), (3, 777, 511)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_the_device(activation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = draw(dtype, *shape)
    out = called(gate, up, activation)
    calls = REFERENCE(gate, up, activation)
    if dtype.itemsize > 2:
        assert torch.equal(out, calls)
    if activation == "silu":
        assert (out != calls).double().mean() < 1e-4
    ours, theirs = errors(gate, up, activation, out)
    assert ours <= 1.01 * theirs
