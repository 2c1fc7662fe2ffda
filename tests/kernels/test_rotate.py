"""Rotary position embedding in one kernel: the bits of the calls that it replaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxopt.ir.ops import rotate as called
from fxopt.kernels.rotate import REFERENCE, rotate

pytest.importorskip("triton")

from fxopt.kernels.rotate.triton import rotate_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter has no bfloat16 of its own.
DTYPES = [torch.float32, torch.float16, torch.float64]
DTYPES += [torch.bfloat16] if DEVICE == "cuda" else []


def draw(dtype: torch.dtype, shape: tuple[int, ...], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as attention has it, a view of [batch, length, heads * dim], and cos and sin."""
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    angle = torch.randn(rows, 1, length, dim, device=DEVICE)
    return x, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((2, 3, 5, 16), 2), ((1, 17, 1, 6), 1), ((3, 1, 2, 80), 1), ((2, 4, 7, 96), 2)],
)
def test_kernel_equals_the_formula_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, int, int, int], rows: int
) -> None:
    x, cos, sin = draw(dtype, shape, rows)
    out = rotate_forward(x, cos, sin)
    assert out.is_contiguous()
    assert torch.equal(out, REFERENCE(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype: torch.dtype) -> None:
    x, cos, sin = draw(dtype, (2, 3, 5, 16), 2)
    torch.library.opcheck(rotate, (x, cos, sin))
    assert torch.equal(rotate(x, cos, sin), REFERENCE(x, cos, sin))


def test_a_rotation_turns_pairs_of_channels() -> None:
    """Against complex numbers: channel i and i + D / 2 are turned by the same angle."""
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    angle = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    both = torch.cat([angle, angle], -1)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(called(x, both.cos(), both.sin()), expected)


def test_gradients_flow_where_they_are_needed() -> None:
    x, cos, sin = (t.double().requires_grad_() for t in draw(torch.float64, (1, 2, 3, 4), 1))
    assert torch.autograd.gradcheck(called, (x, cos, sin))


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.rotate.triton import _rotate_kernel as kernel

constants = dict(H=5, HALF=40, WIDE=tl.float32, BLOCK_H=8, BLOCK_D=64)
names = kernel.arg_names
pointers = dict(x="*bf16", cos="*bf16", sin="*bf16", out="*bf16")
signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
values = {(names.index(n),): v for n, v in constants.items()}
source = ASTSource(kernel, signature, values)
assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_device_keeps_every_bit(dtype: torch.dtype, length: int) -> None:
    x, cos, sin = draw(dtype, (3, 32, length, 128), 3)
    assert torch.equal(called(x, cos, sin), REFERENCE(x, cos, sin))
