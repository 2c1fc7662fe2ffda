"""Token-wise programs run in chunks of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxopt.kernels.chunked.op  # noqa: F401 (registers the op)
from fxopt.kernels.chunked import REFERENCE, program
from fxopt.kernels.quantized_linear import quantize, quantized_linear

GATED = (
    "a = aten.linear(x, t0); b = aten.silu(a); c = aten.linear(x, t1); "
    "d = aten.mul.Tensor(b, c); e = aten.linear(d, t2, t3)"
)


def gated(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((24, 10), (24, 10), (6, 24), (6,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down, bias)


@pytest.mark.parametrize("shape", [(10,), (63, 10), (3, 21, 10), (2, 3, 5, 10), (0, 4, 10)])
@pytest.mark.parametrize("chunk", [1, 8, 63, 100])
def test_chunks_change_nothing(shape: tuple[int, ...], chunk: int) -> None:
    x, tensors = torch.randn(shape, dtype=torch.float64), gated(torch.float64)
    out = torch.ops.fxopt.chunked(x, tensors, GATED, chunk)
    torch.testing.assert_close(out, plain(x, *tensors))
    assert out.is_contiguous()
    torch.testing.assert_close(REFERENCE(x, tensors, GATED, chunk), out)


def test_the_intermediate_never_exists_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = program.run

    def spy(text: str, x: Tensor, tensors: list[Tensor], **options: bool) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return run(text, x, tensors, **options)

    monkeypatch.setattr("fxopt.kernels.chunked.reference.run", spy)
    torch.ops.fxopt.chunked(torch.randn(2, 25, 10), gated(), GATED, 16)
    assert seen == [16, 16, 16, 2]


def test_literals_and_results_in_parts() -> None:
    text = (
        "a = aten.linear(x, t0); b = aten.chunk(a, 2, -1); c = getitem(b, 0); d = getitem(b, 1); "
        "e = aten.gelu(c, approximate='tanh'); f = aten.mul.Tensor(e, d); "
        "g = aten.to.dtype(f, torch.float64); h = aten.pow.Tensor_Scalar(g, -2.5e-1)"
    )
    x, weight = torch.rand(2, 7, 10), torch.rand(8, 10)
    first, second = F.linear(x, weight).chunk(2, -1)
    expected = (F.gelu(first, approximate="tanh") * second).double() ** -0.25
    torch.testing.assert_close(torch.ops.fxopt.chunked(x, [weight], text, 3), expected)


def test_ops_of_fxopt_run_inside_and_inline() -> None:
    packed, scale, zero = quantize(torch.randn(6, 10), 8, 5)
    text = "a = fxopt.quantized_linear(x, t0, t1, t2, None, 8, 5); b = aten.relu(a)"
    x = torch.randn(2, 9, 10)
    expected = quantized_linear(x, packed, scale, zero, None, 8, 5).relu()
    for function in (torch.ops.fxopt.chunked, REFERENCE):
        torch.testing.assert_close(function(x, [packed, scale, zero], text, 4), expected)


@pytest.mark.parametrize(
    "text",
    [
        "a = os.system('true')",
        "a = aten.__class__.mro()",
        "a = fxopt.nothing(x)",
        "import os",
        "a = b = aten.relu(x)",
        "aten.relu(x)",
        "a = x",
        "a = aten.to.dtype(x, torch.save)",
        "a = (",
    ],
)
def test_only_named_calls_of_registered_ops(text: str) -> None:
    with pytest.raises(ValueError, match=r"^chunked: "):
        program.run(text, torch.randn(2, 3), [])


def test_gradients() -> None:
    tensors = gated(torch.float64)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.ops.fxopt.chunked(x, list(tensors), GATED, 2)

    assert torch.autograd.gradcheck(function, (x, *tensors), fast_mode=True)


def test_opcheck() -> None:
    x = torch.randn(3, 7, 10, requires_grad=True)
    torch.library.opcheck(torch.ops.fxopt.chunked.default, (x, gated(), GATED, 4))


def test_inductor() -> None:
    x, tensors = torch.randn(2, 9, 10), gated()

    def function(x: Tensor) -> Tensor:
        return torch.ops.fxopt.chunked(x * 2, tensors, GATED, 4) + 1

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True)
        torch.testing.assert_close(compiled(x), function(x))
