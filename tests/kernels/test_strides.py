"""Every op that has kernels, with tensors that have gaps or lie transposed in memory.

What CUDA runs is called here, interpreted where there is no device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxopt.emit.registry import register_ops
from fxopt.kernels._epilogue import Epilogue
from fxopt.kernels.fp8_linear import fp8_linear, row_scale
from fxopt.kernels.fp8_linear import quantize as to_e4m3
from fxopt.kernels.kv_attention import allocate, parse
from fxopt.kernels.kv_attention.filled import fill
from fxopt.kernels.offload_activation import offload
from fxopt.kernels.quantized_linear import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter truncates to bfloat16
APART = {"attention", "offload"}
"""Ops with tests of their own: the first takes any strides, the second refuses gaps."""

PROMPT = 50

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def draw(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def codes(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    packed, scale, zero = quantize(draw(*shape).flatten(0, -2) / 8, 4, 32)
    return tuple(t.unflatten(0, shape[:-1]) for t in (packed, scale, zero))


def e4m3() -> tuple[Tensor, Tensor]:
    weight = draw(12, 96, dtype=torch.float32)
    scale = row_scale(weight)
    return to_e4m3(weight, scale), scale[:, 0].contiguous()


def gaps(x: Tensor) -> Tensor:
    """Another number of x behind each."""
    plain = x.view(torch.uint8) if x.itemsize == 1 else x  # e4m3 numbers cannot be moved
    return torch.stack([plain, plain.roll(1)], -1).view(x.dtype)[..., 0]


def turned(x: Tensor) -> Tensor:
    """The last dimension is the outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def repeated(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, 0, 1).expand_as(x)


def strided(x: Tensor) -> Iterator[Tensor]:
    """The same numbers, otherwise in memory."""
    if x.dim():
        yield gaps(x)
    if x.dim() > 1:
        yield turned(x)


def cuda(folder: str, name: str = "_cuda") -> Callable[..., Any]:
    """What an op runs on CUDA."""
    return getattr(importlib.import_module(f"fxopt.kernels.{folder}.op"), name)


def _quantized(rows: int) -> Iterator[Call]:
    x, residual = draw(rows, 128), draw(rows, 12)
    given = (*codes(12, 128), draw(12), 4, 32)
    yield cuda("quantized_linear"), (x, *given, "silu", residual, *codes(12, 128), draw(12))


def _fp8(name: str) -> Iterator[Call]:
    """Only devices that have e4m3 run these."""
    kernel: Any = importlib.import_module("fxopt.kernels.fp8_linear.triton")
    rows = 1 if name == "one_row" else 3

    def call(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *following: Tensor) -> Tensor:
        after = Epilogue("silu", following[0], following[1:])
        return getattr(kernel, name)(x, weight, scale, bias, after=after)

    yield call, (draw(rows, 96), *e4m3(), draw(12), draw(rows, 12), *e4m3(), draw(12))


def _low_rank(rows: int) -> Iterator[Call]:
    first, second = ((draw(8, 64), draw(12, 8), draw(12)) for _ in range(2))
    yield cuda("low_rank_linear"), (draw(rows, 64), *first, "silu", draw(rows, 12), *second)


def _monarch(rows: int) -> Iterator[Call]:
    given = (draw(rows, 64), draw(2, 16, 32), draw(2, 6, 16), draw(12), "silu", draw(rows, 12))
    yield cuda("monarch_linear"), given


def _experts() -> Iterator[Call]:
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32, device=DEVICE)
    yield cuda("quantized_experts"), (draw(9, 64), *codes(3, 12, 64), offsets, 4, 32)


def _embedding() -> Iterator[Call]:
    packed, scale, zero = codes(12, 64)
    ids = torch.randint(12, (2, 7), device=DEVICE)
    yield cuda("quantized_embedding"), (packed, ids, scale, zero, 4, 32)


def _norms() -> Iterator[Call]:
    yield cuda("rms_norm"), (draw(2, 3, 24), draw(24), 1e-6)
    yield cuda("rms_norm", "_add_cuda"), (draw(2, 3, 24), draw(2, 3, 24), draw(24), 1e-6)
    weights = draw(24).abs() + 1, draw(24), draw(2, 3, 1).abs() + 1, draw(2, 3, 1)
    yield cuda("norm_input"), (draw(2, 3, 24), *weights, 0.01, [2, 3, 24], HALF)


def _rotations() -> Iterator[Call]:
    q, k, cos, sin = draw(2, 4, 3, 16), draw(2, 2, 3, 16), draw(2, 1, 3, 16), draw(2, 1, 3, 16)
    yield cuda("rotate"), (q, cos, sin)
    yield cuda("rotate", "_both_cuda"), (q, k, cos, sin, None, None, (), 0)
    yield cuda("rotate", "_both_cuda"), (q, k, cos, sin, draw(1, 16, 16), draw(1, 16, 16), (1,), 2)


def _gated() -> Iterator[Call]:
    yield cuda("gated"), (draw(2, 3, 24), draw(2, 3, 24), "silu")


def _derivatives() -> Iterator[Call]:
    """Codes are in the order of memory: they belong to one tensor."""
    x, borders, levels = draw(2, 5, 24), [-0.5, 0.5], [0.0, 0.5, 1.0]
    yield _derivative_of, (x, draw(2, 5, 24), borders, levels)
    code = cuda("activation_function", "_cuda_codes")(x, borders, 2)
    given = (draw(2, 5, 24), code, list(x.stride()), levels, 2)
    yield cuda("activation_function", "_cuda_times"), given


def _derivative_of(x: Tensor, gradient: Tensor, borders: Any, levels: Any) -> Tensor:
    codes = cuda("activation_function", "_cuda_codes")(x, borders, 2)
    return cuda("activation_function", "_cuda_times")(gradient, codes, _dense(x), levels, 2)


def _packing() -> Iterator[Call]:
    x = draw(2, 5, 24)
    yield _packed_and_back, (x,)
    stored = cuda("pack_activation", "_cuda_pack")(x, 4, 16)
    yield cuda("pack_activation", "_cuda_unpack"), (*stored, x.shape, x.stride(), 4, 16)


def _packed_and_back(x: Tensor) -> Tensor:
    # Groups of one number, or of all of them: those of turned tensors are others.
    stored = cuda("pack_activation", "_cuda_pack")(x, 8, 1024)
    return cuda("pack_activation", "_cuda_unpack")(*stored, x.shape, _dense(x), 8, 1024)


def _dense(x: Tensor) -> list[int]:
    """Strides in which the numbers of x are taken."""
    return list(torch.empty_like(x).stride())


def _losses() -> Iterator[Call]:
    labels = torch.randint(12, (9,), device=DEVICE)
    head = draw(9, 24), draw(12, 24), draw(12), labels
    options, needs = (-100, 0.1, 3.0, 1e-4, 0.0), [True, True, True]
    op: Any = importlib.import_module("fxopt.kernels.cut_cross_entropy.op")
    run = {
        name: op._on_device(getattr(op.reference, f"cut_cross_entropy{name}"))
        for name in ("", "_sum", "_backward")
    }
    yield run[""], (*head, *options, 4)
    yield run["_sum"], (*head, True, *options, needs, 4)
    loss, lse = run[""](*head, *options, 4)
    given = (torch.rand_like(loss), torch.rand_like(lse), *head, lse, *options, needs, 4)
    yield run["_backward"], given


def _cached(layout: str, dim: int, tokens: int, *window: int) -> Iterator[Call]:
    """A state that holds tokens of a prompt, and `tokens` more."""
    state = allocate(parse(layout), 1, 2, dim, dim, 96, HALF, DEVICE)
    start = torch.zeros((), dtype=torch.int64, device=DEVICE)
    options = (0.25, True, list(window) or [0], 0.0, [0], layout)

    def call(*given: Any) -> tuple[Tensor, ...]:
        out = cuda("kv_attention", "_cached_cuda")(*given[:3], given[7:], *given[3:7], *options)
        return out, *given[7:]

    def new(n: int) -> tuple[Tensor, ...]:
        return draw(1, 4, n, dim), draw(1, 2, n, dim), draw(1, 2, n, dim)

    call(*new(PROMPT), start, None, None, None, *state)
    mask = torch.ones(1, PROMPT + tokens, dtype=torch.int64, device=DEVICE)
    mask[0, :5] = 0
    bias = draw(1, 4, tokens, PROMPT + tokens) if dim < 64 else None
    yield call, (*new(tokens), start + PROMPT, mask, bias, draw(4), *state)


def _filled() -> Iterator[Call]:
    state = fill(draw(1, 2, 40, 16), draw(1, 2, 40, 16), None, "k4v2g32r8s4")

    def call(*given: Any) -> Tensor:
        q, mask, bias, sinks, *state = given
        run = cuda("kv_attention", "_filled_cuda")
        return run(q, state, mask, bias, sinks, 0.25, 0.0, "k4v2g32r8s4")

    mask = torch.ones(1, 40, dtype=torch.int64, device=DEVICE)
    mask[0, :5] = 0
    yield call, (draw(1, 4, 3, 16), mask, draw(1, 4, 3, 40), draw(4), *state)


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "quantized_linear, one row": lambda: _quantized(1),
    "quantized_linear, few rows": lambda: _quantized(3),
    "quantized_linear, more rows": lambda: _quantized(17),
    "quantized_linear, most rows": lambda: _quantized(257),
    "fp8_linear, one row": lambda: _fp8("one_row"),
    "fp8_linear, few rows": lambda: _fp8("fp8_linear"),
    "low_rank_linear, one row": lambda: _low_rank(1),
    "low_rank_linear, few rows": lambda: _low_rank(5),
    "low_rank_linear, more rows": lambda: _low_rank(17),
    "monarch_linear, few rows": lambda: _monarch(3),
    "monarch_linear, more rows": lambda: _monarch(17),
    "quantized_experts": _experts,
    "quantized_embedding": _embedding,
    "norms": _norms,
    "rotate": _rotations,
    "gated": _gated,
    "activation_function": _derivatives,
    "pack_activation": _packing,
    "cut_cross_entropy": _losses,
    "kv exact": lambda: _cached("", 16, 1),
    "kv windows": lambda: _cached("", 16, 3, 29),
    "kv packed": lambda: _cached("k4v2g32r8s4", 16, 1),
    "kv int8": lambda: _cached("k8v8g32r8s4", 64, 1),
    "kv prefill": lambda: _cached("k4v2g32r8s4", 16, 33),
    "kv filled": _filled,
}
SERVED = {
    "norms": {"rms_norm", "add_rms_norm", "norm_input"},
    "rotate": {"rotate", "rotate_both"},
    "activation_function": {"derivative_codes", "times_derivative"},
    "pack_activation": {"pack_activation", "unpack_activation"},
    "cut_cross_entropy": {f"cut_cross_entropy{name}" for name in ("", "_sum", "_backward")},
    "kv exact": {"cached_attention"},
    "kv filled": {"filled_attention"},
}


def test_every_op_with_kernels_is_here() -> None:
    register_ops()
    dispatched = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fxopt::")]
    kernels = {n.removeprefix("fxopt::") for n in names if dispatched(n, "CUDA")}
    here = [SERVED.get(case, {case.split(",")[0]}) for case in CALLS if case[:3] != "kv "]
    here += [SERVED["kv exact"], SERVED["kv filled"]]
    assert set().union(*here) | APART == kernels


SLOW = {"low_rank_linear, one row", "kv prefill", "kv int8"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CALLS]
)
def test_no_stride_changes_a_number(case: str) -> None:
    for function, given in CALLS[case]():
        wanted = _tensors(function(*_copies(given)))
        for place, x in enumerate(given):
            for one in strided(x) if isinstance(x, Tensor) else ():
                found = function(*_copies(given[:place]), one, *_copies(given[place + 1 :]))
                for a, b in zip(_tensors(found), wanted, strict=True):
                    same = torch.allclose(a.double(), b.double(), rtol=2e-3, atol=2e-3)
                    assert same, f"argument {place}, strides {one.stride()}"


def _copies(given: Sequence[Any]) -> list[Any]:
    """Some tensors are written to."""
    return [t.clone() if isinstance(t, Tensor) else t for t in given]


def _tensors(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.gpu
def test_a_product_of_many_rows_by_the_library() -> None:
    x, bias = draw(32, 96, dtype=torch.bfloat16), draw(48, dtype=torch.bfloat16)
    weight = draw(48, 96, dtype=torch.float32)
    scale = row_scale(weight)
    given = to_e4m3(weight, scale), scale[:, 0].contiguous(), bias
    wanted = fp8_linear(x, *given)
    for place in range(3):
        changed = [gaps(t) if i == place else t for i, t in enumerate(given)]
        torch.testing.assert_close(fp8_linear(x, *changed), wanted)


def test_copies_to_the_host_refuse_gaps() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(offload(x.T), x.flatten())
    with pytest.raises(ValueError, match=r"\[10, 2\] .* leave gaps"):
        offload(gaps(x))
