"""The Triton kernel of `quantized_embedding`: interpreted where there is no device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxopt.kernels.quantized_embedding import triton
from fxopt.kernels.quantized_linear import dequantize, quantize
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 63), (8, 126), (4, 42), (4, 126)])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("block", [16, 1024])
def test_rows(
    dtype: torch.dtype,
    bits: int,
    group: int,
    kind: torch.dtype,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "BLOCK", block)
    packed, scale, zero = quantize(torch.randn(50, 126, device=DEVICE).to(dtype), bits, group)
    ids = torch.randint(50, (7, 3), device=DEVICE).to(kind).T
    out = triton.quantized_embedding(packed, ids, scale, zero, bits, group)
    exact = dequantize(packed, scale.double(), zero.double(), bits, group)[ids.long()]
    assert out.dtype == dtype
    assert out.is_contiguous()
    # the interpreter truncates to bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2.0 * torch.finfo(dtype).eps, atol=0)


def test_no_rows() -> None:
    packed, scale, zero = quantize(torch.randn(5, 64, device=DEVICE), 8, 64)
    ids = torch.zeros((0, 4), dtype=torch.long, device=DEVICE)
    assert triton.quantized_embedding(packed, ids, scale, zero, 8, 64).shape == (0, 4, 64)


COMPILE = """
from fxopt.kernels.quantized_embedding.triton import _rows_kernel as kernel
from tests.kernels.ahead_of_time import build

for bits in (4, 8):
    constants = dict(BITS=bits, GROUP=128, BLOCK=1024)
    pointers = dict(packed="*u8", indices="*i64", scale="*bf16", zero="*bf16", out="*bf16")
    assert build(kernel, pointers, **constants).asm["cubin"]
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    compiled(COMPILE)
