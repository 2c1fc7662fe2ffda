"""Linear layers in e4m3 against float64: format, op, gradients, tracers, kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.kernels._epilogue import Epilogue
from fxopt.kernels.fp8_linear import REFERENCE, dequantize, fp8_linear, quantize, row_scale
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = 2.0**-4
"""Half the distance of neighbouring e4m3 numbers, relative to the smaller one."""


def stored(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = row_scale(weight)
    return quantize(weight, scale), scale[:, 0].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_within_half_a_step_of_each_row(dtype: torch.dtype) -> None:
    rows = (torch.randn(63, 500) * torch.logspace(-4, 4, 63)[:, None]).to(dtype)
    scale = row_scale(rows)
    assert torch.equal(scale, row_scale(-rows))
    restored = dequantize(quantize(rows, scale), scale[:, 0])
    allowed = STEP * rows.float().abs() + scale * 2.0**-10  # the last: subnormal numbers
    assert ((restored - rows.float()).abs() <= allowed).all()
    largest = rows.float().abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(
        restored.gather(1, largest), rows.float().gather(1, largest), rtol=1e-6, atol=0
    )


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.randn(5, 32)
    weight[2] = 0
    y = fp8_linear(torch.zeros(3, 32), *stored(weight), None)
    assert torch.equal(y, torch.zeros(3, 5))
    y = fp8_linear(torch.randn(3, 32), *stored(weight), None)
    assert torch.isfinite(y).all()
    assert (y[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_computes_the_product_of_the_rounded_operands(dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 63, 500).to(dtype), torch.randn(80).to(dtype)
    weight, scale = stored(torch.randn(80, 500))
    own = row_scale(x)
    rounded = quantize(x, own).double() * own.double()
    exact = F.linear(rounded, weight.double() * scale.double()[:, None], bias.double())
    y = fp8_linear(x, weight, scale, bias)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (2, 63, 80), True)
    assert (y.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_gradients_pass_through_the_rounding_of_x() -> None:
    x = torch.randn(7, 48, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True)
    weight, scale = stored(torch.randn(16, 48))
    grad = torch.randn(7, 16, dtype=torch.float64)
    (fp8_linear(x, weight, scale, bias) * grad).sum().backward()
    torch.testing.assert_close(x.grad, grad @ dequantize(weight, scale).double())
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_registration_and_compilation() -> None:
    weight, scale = stored(torch.randn(16, 48))
    # not test_schema: it multiplies copies of the arguments, which e4m3 cannot be
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for x in (torch.randn(3, 48), torch.randn(2, 3, 48, requires_grad=True)):
        torch.library.opcheck(fp8_linear, (x, weight, scale, torch.randn(16)), test_utils=utils)
    following = ("silu", torch.randn(3, 16).double(), weight, scale, torch.randn(16))
    given = (torch.randn(3, 48, requires_grad=True), weight, scale, None, *following)
    torch.library.opcheck(fp8_linear, given, test_utils=utils)
    compiled = torch.compile(lambda x: fp8_linear(x, weight, scale, None) + 1, fullgraph=True)
    x = torch.randn(5, 48)
    torch.testing.assert_close(compiled(x), REFERENCE(x, weight, scale, None) + 1)


@pytest.mark.parametrize(
    ("x", "scale", "dtype", "message"),
    [
        ((3, 47), (16,), torch.float8_e4m3fn, r"x \[3, 47\]"),
        ((3, 48), (15,), torch.float8_e4m3fn, r"scale \[15\]"),
        ((3, 48), (16,), torch.float32, "must be torch.float8_e4m3fn"),
    ],
)
def test_arguments_that_do_not_fit(
    x: tuple[int, int], scale: tuple[int], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fp8_linear(torch.zeros(x), torch.zeros(16, 48).to(dtype), torch.ones(scale), None)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("paired", [False, True])
def test_what_follows_the_product(activation: str, paired: bool) -> None:
    """To the bit what calls of their own give, with their gradients."""
    first, second = (stored(torch.randn(16, 48) / 8) for _ in range(2))
    x, residual = torch.randn(3, 48), torch.randn(16, 3).T
    inputs = [t.requires_grad_() for t in (x, residual, torch.randn(16), torch.randn(16))]

    def call(x: Tensor, residual: Tensor, bias: Tensor, up_bias: Tensor) -> Tensor:
        up = (*second, up_bias) if paired else ()
        return fp8_linear(x, *first, bias, activation, residual, *up)

    def calls(x: Tensor, residual: Tensor, bias: Tensor, up_bias: Tensor) -> Tensor:
        y = ACTIVATIONS[activation](fp8_linear(x, *first, bias))
        return (y * fp8_linear(x, *second, up_bias) if paired else y) + residual

    out, wanted = call(*inputs), calls(*inputs)
    assert torch.equal(out, wanted)
    assert out.is_contiguous()
    grad, trained = torch.randn(3, 16), inputs if paired else inputs[:3]
    for found, want in zip(
        torch.autograd.grad(out, trained, grad), torch.autograd.grad(wanted, trained, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, want)


def test_a_residual_of_another_dtype_promotes() -> None:
    weight, residual = stored(torch.randn(16, 48)), torch.randn(3, 16)
    x = torch.randn(3, 48).bfloat16().requires_grad_()
    out = fp8_linear(x, *weight, None, "relu", residual)
    calls = F.relu(fp8_linear(x, *weight, None)) + residual
    assert out.dtype == torch.float32
    assert torch.equal(out, calls)
    found, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, calls))
    torch.testing.assert_close(found, want)


def test_what_cannot_follow_is_an_error() -> None:
    x, weight = torch.randn(3, 48), stored(torch.randn(16, 48))
    with pytest.raises(ValueError, match="activation must be empty, silu"):
        fp8_linear(x, *weight, None, "tanh")
    with pytest.raises(ValueError, match=r"the residual is \[1, 16\]"):
        fp8_linear(x, *weight, None, "", torch.randn(1, 16))
    with pytest.raises(ValueError, match="a second weight is up_weight and up_scale"):
        fp8_linear(x, *weight, None, "silu", None, weight[0])
    with pytest.raises(ValueError, match=r"weight \[15, 48\]"):
        fp8_linear(x, *weight, None, "silu", None, weight[0][1:], weight[1][1:])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight, scale = stored(torch.randn(24, 48))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return REFERENCE(x, self.weight, self.scale, self.bias)


def test_reference_runs_in_onnxruntime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Layer().eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.randn(3, 48),), dynamic_shapes=dynamic)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(11, 48)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = module(x)
    assert (torch.from_numpy(out) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_rounds_rows_as_the_reference_does(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.fp8_linear import triton

    x = torch.randn(500, 63, device=DEVICE).to(dtype).T  # rows that are not contiguous
    y, scale = triton.quantize_rows(x)
    assert y.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, row_scale(x))
    same = y.float() == quantize(x, scale).float()
    # the interpreter's cast rounds ties the other way and loses the carry into the exponent
    assert same.all() if DEVICE == "cuda" else same.float().mean() > 0.9


@pytest.mark.parametrize("rows", [1, 3])
def test_kernel_of_few_rows(rows: int) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.fp8_linear import triton

    x = torch.randn(rows, 96, device=DEVICE).to(torch.bfloat16)
    bias = torch.randn(50, device=DEVICE).to(torch.bfloat16)
    weight, scale = stored(torch.randn(50, 96, device=DEVICE))
    y, expected = triton.fp8_linear(x, weight, scale, bias), REFERENCE(x, weight, scale, bias)
    # the interpreter's casts to e4m3 are not exact
    limit = 0.01 if DEVICE == "cuda" else 0.05
    assert (y - expected).float().norm() <= limit * expected.float().norm()
    if rows == 1:
        for block in (32, 64):  # steps that fill the columns, and ones that do not
            own = triton.one_row(x, weight, scale, bias, triton.Vector(4, block))
            assert (own - y).float().norm() <= 0.01 * y.float().norm()


@pytest.mark.parametrize("paired", [False, True])
def test_scales_whose_product_is_no_float32(paired: bool) -> None:
    """The sum, which is large, is multiplied by one after the other."""
    pytest.importorskip("triton")
    from fxopt.kernels.fp8_linear import triton

    x, weight = torch.randn(1, 96, device=DEVICE), torch.randn(50, 96, device=DEVICE)
    small, ones = stored(weight * 2.0**-64), stored(weight)
    bias = torch.ones(50, device=DEVICE) if paired else None
    # A gate of ones, or one product alone.
    first, after = small, Epilogue()
    if paired:
        first, after = (torch.zeros_like(ones[0]), ones[1]), Epilogue("", None, (*small, None))
    out = triton.one_row(x * 2.0**-72, *first, bias, after=after)
    wanted = triton.one_row(x, *ones, None) * 2.0**-72 * 2.0**-64
    assert wanted.any()
    assert (out.double() - wanted.double()).norm() <= 1e-3 * wanted.double().norm()


@pytest.mark.parametrize("activation", ["", "silu", "gelu"])
@pytest.mark.parametrize(("paired", "added"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("rows", [1, 3])
def test_kernels_do_what_follows(rows: int, activation: str, paired: bool, added: bool) -> None:
    """What calls of their own give to the products of the same kernels."""
    pytest.importorskip("triton")
    from fxopt.kernels.fp8_linear import triton

    dtype = torch.float16  # the interpreter truncates to bfloat16
    x, bias = torch.randn(rows, 96, device=DEVICE).to(dtype), torch.randn(50, device=DEVICE)
    residual = torch.randn(50, rows, device=DEVICE).to(dtype).T if added else None
    weights = [
        (*stored(torch.randn(50, 96, device=DEVICE) / 8), b.to(dtype)) for b in (bias, -bias)
    ]
    kernels: list[Any] = [triton.fp8_linear, *([triton.one_row] if rows == 1 else [])]
    for kernel in kernels:
        after = Epilogue(activation, residual, weights[1] if paired else None)
        out = kernel(x, *weights[0], after=after)
        y, up = (kernel(x, *weight) for weight in weights)
        calls, exact = ACTIVATIONS[activation](y), ACTIVATIONS[activation](y.double())
        if paired:
            calls, exact = calls * up, exact * up.double()
        if residual is not None:
            calls, exact = calls + residual, exact + residual.double()
        assert out.is_contiguous()
        assert (out.double() - exact).norm() <= 1.01 * (calls.double() - exact).norm() + 1e-6


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.fp8_linear.triton import LARGEST, LEAST
from fxopt.kernels.fp8_linear.triton import _quantize_rows_kernel, _vector_kernel

def build(kernel, signature, **constants):
    constants |= dict(LARGEST=LARGEST, LEAST=LEAST)
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, values)
    print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))

signature = dict(x="*bf16", y="*fp8e4nv", scale="*fp32", K="i32")
build(_quantize_rows_kernel, signature, STARTS=True, BLOCK_K=256)
p, f, q = "*bf16", "*fp32", "*fp8e4nv"
signature = dict(x=p, w=q, scale=f, bias=p, up_w=q, up_scale=f, up_bias=p, residual=p, y=p)
signature |= dict(N="i32", K="i32")
for both in (False, True):
    build(_vector_kernel, signature, HAS_BIAS=True, HAS_UP_BIAS=both, ACTIVATION="silu",
          PAIRED=both, HAS_RESIDUAL=both, EVEN=True, BLOCK_ALL=4096, BLOCK_N=4, BLOCK_K=2048)
"""


def test_kernel_compiles_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    sizes = [int(size) for (size,) in compiled(COMPILE)]
    assert len(sizes) == 3
    assert all(size > 0 for size in sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 17, 500])
def test_op_on_the_device(rows: int) -> None:
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    weight, scale = stored(torch.randn(512, 1024, device="cuda"))
    y, expected = fp8_linear(x, weight, scale, bias), REFERENCE(x, weight, scale, bias)
    assert (y - expected).float().norm() <= 0.01 * expected.float().norm()
