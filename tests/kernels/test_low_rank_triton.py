"""Triton kernels of low-rank layers, and what is left to the library: interpreted on a CPU, on the
device where there is one. `test_linear_triton.py` compiles them ahead of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fxopt.kernels._epilogue import Epilogue, activate
from fxopt.kernels._triton import few_rows
from fxopt.kernels.low_rank_linear import op as low_rank_op
from fxopt.kernels.low_rank_linear import triton as low_rank_triton
from tests.kernels.linear_error import assert_close, assert_mostly_equal, draw


def few(splits: int = 1, block_m: int = 16) -> few_rows.Configuration:
    return few_rows.Configuration(16, 64, 4, 3, splits, block_m)


LOW_RANK = {
    "vector": (1, (low_rank_triton.Vector(2, 64), low_rank_triton.Vector(4, 32))),
    "vector, split": (3, (low_rank_triton.Vector(2, 64, 4, 3), low_rank_triton.Vector(4, 32))),
    "few": (5, (few(), few())),
    "few, split": (5, (few(3), few())),
    "few, added": (5, (few(3), few(), True)),
    "tiles": (40, (few(2, 32), few(1, 32), True)),
    "both": (2, (low_rank_triton.Vector(2, 64, 4, 2), few())),
}


@pytest.mark.parametrize("cut", LOW_RANK)
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.bfloat16, (320, 48)), (torch.bfloat16, (312, 40)), (torch.float32, (63, 9))],
)
def test_low_rank(dtype: torch.dtype, cut: str, sizes: tuple[int, int]) -> None:
    """Sides of multiples of 16, of 8, and of none; sums cut unevenly, or into more parts than there
    are steps."""
    (rows, chosen), (depth, rank) = LOW_RANK[cut], sizes
    x, bias = draw(depth, rows, dtype=dtype).T, draw(51, dtype=dtype)
    down, up = draw(rank, depth, dtype=dtype), draw(51, rank, dtype=dtype)
    c = low_rank_triton.Configuration(*chosen)
    out = low_rank_triton.low_rank_linear(x, down, up, bias, c)
    assert_close(out, x, up.double() @ down.double(), bias)


@pytest.mark.parametrize("cut", LOW_RANK)
@pytest.mark.parametrize(("activation", "paired"), [("silu", True), ("gelu", False)])
def test_what_follows_low_rank(cut: str, activation: str, paired: bool) -> None:
    """No further from float64 than calls of their own, after the same sums."""
    dtype, (rows, chosen) = torch.float16, LOW_RANK[cut]
    c = low_rank_triton.Configuration(*chosen)
    x, residual = draw(rows, 320, dtype=dtype), draw(51, rows, dtype=dtype).T
    first, second = (
        (draw(40, 320, dtype=dtype) / 16, draw(51, 40, dtype=dtype) / 4, draw(51, dtype=dtype))
        for _ in range(2)
    )
    after = Epilogue(activation, residual, second if paired else None)
    out = low_rank_triton.low_rank_linear(x, *first, c, after)
    y, up = (low_rank_triton.low_rank_linear(x, *weight, c) for weight in (first, second))
    calls, exact = activate(y, activation), activate(y.double(), activation)
    if paired:
        calls, exact = calls * up, exact * up.double()
    calls, exact = calls + residual, exact + residual.double()
    assert out.is_contiguous()
    assert (out.double() - exact).norm() <= 1.01 * (calls.double() - exact).norm()
    assert_mostly_equal(out, calls)


@pytest.mark.parametrize(("rows", "kernels"), [(1, 1), (3, 1), (16, 1), (17, 0)])
@pytest.mark.parametrize("paired", [False, True])
def test_low_rank_by_what_is_launched(
    rows: int, kernels: int, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA runs, on whatever device this is: kernels for few rows, else the library."""
    launched: list[int] = []
    known = low_rank_triton.low_rank_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        launched.append(1)
        return known(*args, **kwargs)

    monkeypatch.setattr(low_rank_triton, "low_rank_linear", counted)
    dtype = torch.float16
    x, residual = draw(rows, 320, dtype=dtype), draw(rows, 51, dtype=torch.float32)
    first, second = (
        (draw(40, 320, dtype=dtype) / 16, draw(51, 40, dtype=dtype) / 4, draw(51, dtype=dtype))
        for _ in range(2)
    )
    given = (x, *first, "silu", residual, *(second if paired else ()))
    out = low_rank_op._cuda(*given)  # pyright: ignore[reportPrivateUsage]
    assert len(launched) == kernels
    assert out.dtype == torch.float32
    wanted = low_rank_op.reference.low_rank_linear(*given)
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
    # Two ranks, and rows that cannot be read 16 bytes at once.
    launched.clear()
    narrow = second[0][:32], second[1][:, :32].contiguous(), None
    for odd in (
        (x, *first, "silu", None, *narrow),
        (x[:, :-1], first[0][:, :-1].contiguous(), *first[1:]),
        (x.float(), *(t.float() for t in first)),
    ):
        out = low_rank_op._cuda(*odd)  # pyright: ignore[reportPrivateUsage]
        torch.testing.assert_close(
            out, low_rank_op.reference.low_rank_linear(*odd), rtol=2e-3, atol=2e-3
        )
    assert not launched


HALVES = ((4096, 1024, 4096), (4096, 1600, 14336), (14336, 1600, 4096))
"""Inputs, rank and outputs where two factors have half of a weight's parameters."""


def test_an_h200_gets_the_cuts_of_low_rank_that_were_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_triton, "processors", lambda _: 132)
    cuda, cut = torch.device("cuda"), low_rank_triton.Vector
    found = [low_rank_triton.configuration(1, *sizes, cuda) for sizes in HALVES]
    assert [c.first for c in found] == [cut(2, 1024, 4, 2), cut(4, 1024), cut(2, 1024, 4, 2)]
    assert all(c[1:] == (cut(8, 1024), False) for c in found)
    c = low_rank_triton.configuration(16, *HALVES[0], cuda)
    first, second = few_rows.Configuration(32, 256, 4, 4, 4), few_rows.Configuration(32, 128, 4, 7)
    assert c == (first, second, True)
    for rows, paired in ((2, False), (1, True)):
        assert low_rank_triton.configuration(rows, *HALVES[0], cuda, paired).second.block_n == 4


@pytest.mark.parametrize("processors", [40, 132])
@pytest.mark.parametrize("rank", [8, 256, 1024, 1600, 2048, 4096])
def test_tensor_cores_read_sums_that_were_added(
    processors: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of sums in float32 would need more shared memory than most devices have."""
    monkeypatch.setattr(low_rank_triton, "processors", lambda _: processors)
    for rows, columns in ((3, 1024), (16, 4096), (16, 14336)):
        c = low_rank_triton.configuration(rows, 4096, rank, columns, torch.device("cuda"))
        assert c.added == (c.first.splits > 1)
        assert c.second.splits == 1
    assert c.first.splits > 1 or rank >= 1024


def test_large_factors_and_several_rows_are_left_to_the_library() -> None:
    for rows, sizes, fused in (
        (1, HALVES[2], True), (2, HALVES[1], True), (3, HALVES[1], False),
        (16, HALVES[2], False), (16, HALVES[0], True), (17, HALVES[0], False),
    ):  # fmt: skip
        k, rank, n = sizes
        x, down, up = (
            torch.empty(*shape, dtype=torch.bfloat16, device="meta")
            for shape in ((rows, k), (rank, k), (n, rank))
        )
        assert low_rank_op._fused(x, down, up, None, Epilogue()) == fused  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("odd", ["x", "down", "up", "bias", "second_up", "second_bias"])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_low_rank_of_several_dtypes_is_an_error(odd: str, other: torch.dtype) -> None:
    shapes = {"x": (2, 64), "down": (8, 64), "up": (51, 8), "bias": (51,)}
    given = {n: draw(*s, dtype=torch.float16) for n, s in shapes.items()}
    given |= {f"second_{n}": draw(*shapes[n], dtype=torch.float16) for n in ("down", "up", "bias")}
    given[odd] = given[odd].to(other)
    second = [given.pop(f"second_{n}") for n in ("down", "up", "bias")]
    with pytest.raises(RuntimeError, match="dtype"):
        low_rank_op._cuda(*given.values(), "silu", None, *second)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(("depth", "rank"), [(64, 0), (0, 8)])
def test_low_rank_of_nothing_is_the_bias(depth: int, rank: int) -> None:
    x, bias = draw(3, depth, dtype=torch.float16), draw(51, dtype=torch.float16)
    factors = draw(rank, depth, dtype=torch.float16), draw(51, rank, dtype=torch.float16)
    out = low_rank_op._cuda(x, *factors, bias)  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(out, bias.expand(3, 51))


def test_no_copy_comes_between_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kernel reads its weight before it waits for the one before it."""
    done: list[str] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.clone.default:
                done.append("copy")
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(low_rank_triton, "_launch", lambda *_, **__: done.append("launch"))
    first, second = (
        (draw(320, 40, dtype=torch.float16).T, draw(40, 51, dtype=torch.float16).T, None)
        for _ in range(2)
    )
    x, residual = draw(320, 1, dtype=torch.float16).T, draw(51, 2, dtype=torch.float16)[:, :1].T
    with Copies():
        low_rank_triton.low_rank_linear(x, *first, after=Epilogue("silu", residual, second))
    assert done == ["copy"] * 5 + ["launch"] * 2
