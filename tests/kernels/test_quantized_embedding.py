"""Rows of an integer table: against the whole table restored, op, tracers, Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.quantized_embedding import REFERENCE, quantized_embedding
from fxopt.kernels.quantized_linear import dequantize, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ((8, 63), (8, 126), (4, 42), (4, 126))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7)], ids=str)
def test_is_a_row_of_the_restored_table(
    dtype: torch.dtype, bits: int, group: int, shape: tuple[int, ...]
) -> None:
    packed, scale, zero = quantize(torch.randn(50, 126).to(dtype), bits, group)
    ids = torch.randint(50, shape)
    out = quantized_embedding(packed, ids, scale, zero, bits, group)
    assert torch.equal(out, dequantize(packed, scale, zero, bits, group)[ids])
    assert out.is_contiguous()
    assert out.shape == (*shape, 126)


def test_the_table_is_not_restored() -> None:
    """The meta device counts what is made: nothing of the table's size."""
    packed, scale, zero = quantize(torch.randn(4000, 64), 8, 64)
    made: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Counting():
        REFERENCE(packed, torch.randint(4000, (3,)), scale, zero, 8, 64)
    assert max(made) <= 3 * 64


@pytest.mark.parametrize(("bits", "group"), [(8, 126), (4, 42)])
def test_opcheck_and_inductor(bits: int, group: int) -> None:
    packed, scale, zero = quantize(torch.randn(50, 126), bits, group)
    ids = torch.randint(50, (4, 9))
    torch.library.opcheck(
        torch.ops.fxopt.quantized_embedding.default, (packed, ids, scale, zero, bits, group)
    )

    def block(ids: Tensor) -> Tensor:
        return quantized_embedding(packed, ids.T, scale, zero, bits, group) * 2

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(ids), block(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"group_size": 50}, "must divide"),
        ({"group_size": 126}, "has 126 features, which scale \\[50, 3\\] does not hold"),
    ],
)
@pytest.mark.parametrize("function", [REFERENCE, quantized_embedding])
def test_arguments_that_do_not_fit(function: Any, change: dict[str, int], message: str) -> None:
    packed, scale, zero = quantize(torch.randn(50, 126), 4, 42)
    call = {
        "packed": packed, "indices": torch.zeros(2, dtype=torch.long), "scale": scale,
        "zero": zero, "bits": 4, "group_size": 42,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        function(**call | change)
