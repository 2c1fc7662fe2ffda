"""Inputs of norms from their outputs, against the norms themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.decide.verify import peak_live_bytes
from fxopt.kernels.norm_input import REFERENCE, norm_input, workspace
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
KINDS = pytest.mark.parametrize("kind", ["layer", "no bias", "bare", "rms", "normalised"])


def normed(kind: str, dtype: torch.dtype, width: int = 63, **more: Any) -> tuple[Tensor, list[Any]]:
    """x [3, 5, width] in float64, and its norm's output, parameters and statistics in `dtype`."""
    x = 2 * torch.randn(3, 5, width, dtype=torch.float64, **more) + 1
    weight = torch.rand(width, dtype=torch.float64, **more) + 0.5
    bias = torch.randn(width, dtype=torch.float64, **more)
    mean = x.mean(-1, keepdim=True)
    rstd = (x - mean).square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    parts: list[Any] = [weight, bias, rstd, mean]
    if kind in ("rms", "normalised"):
        parts = [weight, None, x.square().mean(-1, keepdim=True).add(1e-5).rsqrt(), None]
    elif kind != "layer":
        parts = [weight if kind == "no bias" else None, None, rstd, mean]
    y = (x - (parts[3] if parts[3] is not None else 0)) * parts[2]
    if kind == "normalised":
        x, parts[2] = y, None
    y = y * (1 if parts[0] is None else weight) + (0 if parts[1] is None else bias)
    if kind == "layer":
        torch.testing.assert_close(y, F.layer_norm(x, (width,), weight, bias))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, [y.to(dtype), *(t if t is None else t.to(wide) for t in parts)]


@DTYPES
@KINDS
def test_what_a_norm_was_given(kind: str, dtype: torch.dtype) -> None:
    x, given = normed(kind, dtype, device=DEVICE)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for out in {wide, dtype}:
        made = norm_input(*given, 0.0, (15, 63), out)
        assert made.dtype == out
        # the output's rounding, relative to output and bias, over a weight of 0.5 and more
        off = torch.finfo(dtype).eps * (12 if kind == "layer" else 6)
        torch.testing.assert_close(made.double(), x.view(15, 63), rtol=off, atol=4 * off)


@DTYPES
@KINDS
def test_kernel_is_the_reference(kind: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.norm_input import triton

    if dtype == torch.float64:
        pytest.skip("the reference serves float64")
    monkeypatch.setattr(triton, "BLOCK", 32)
    _, given = normed(kind, dtype, device=DEVICE)
    if given[1] is not None:
        given[1][7] = 1e-3
    for out in (torch.float32, dtype):
        mine = triton.norm_input(*given, 0.01, (3, 5, 63), out)
        truth = REFERENCE(*given, 0.01, (3, 5, 63), out)
        torch.testing.assert_close(mine, truth, rtol=2 * torch.finfo(out).eps, atol=1e-6)


def test_a_weight_that_is_nothing_gives_the_mean() -> None:
    _, (y, weight, bias, rstd, mean) = normed("layer", torch.float32)
    weight[[2, 5]] = torch.tensor([0.0, -0.009])
    made = norm_input(y, weight, bias, rstd, mean, 0.01, y.shape, torch.float32)
    assert made.isfinite().all()
    torch.testing.assert_close(made[..., [2, 5]], mean.expand(3, 5, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_what_is_alive(dtype: torch.dtype) -> None:
    y = torch.randn(64, 512).bfloat16()
    weight, rstd = torch.ones(512), torch.ones(64, 1)

    def call() -> Tensor:
        return norm_input(y, weight, None, rstd, None, 0.0, y.shape, dtype)

    counted = call().nbytes + workspace(y.numel(), dtype)
    assert peak_live_bytes(call, torch.device("cpu")) == pytest.approx(counted, rel=0.05)


@KINDS
def test_registration(kind: str) -> None:
    _, given = normed(kind, torch.float32)
    torch.library.opcheck(norm_input, (*given, 0.1, (15, 63), torch.bfloat16))


@pytest.mark.parametrize(("place", "name"), [(1, "weight"), (2, "bias"), (3, "rstd"), (4, "mean")])
def test_shapes_that_do_not_fit(place: int, name: str) -> None:
    _, given = normed("layer", torch.float32)
    given[place] = torch.ones(7)
    with pytest.raises(ValueError, match=rf"{name} \[7\] does not fit y \[3, 5, 63\]"):
        norm_input(*given, 0.0, (3, 5, 63), torch.float32)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.norm_input.triton import _norm_input_kernel as kernel

signature = dict(y="*bf16", weight="*fp32", bias="*fp32", rstd="*fp32", mean="*fp32", x="*fp32")
signature |= dict(D="i32", least="fp32")
constants = dict(WEIGHT=True, BIAS=True, RSTD=True, MEAN=True, BLOCK=2048)
signature |= dict.fromkeys(constants, "constexpr")
values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
source = ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, values)
print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_kernel_compiles_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    ((size,),) = compiled(COMPILE)
    assert int(size) > 0
