"""The Triton attention kernel, interpreted on a CPU, compiled for sm_90, run on a GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.attention import attention_with_lse
from fxopt.kernels.attention.spec import bind
from tests.crossed import crossed
from tests.kernels.ahead_of_time import compiled

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    batch: int, kv: int, group: int, queries: int, keys: int, dim: int, value_dim: int,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    call: dict[str, Any] = {
        "q": random_tensor(batch, queries, kv * group, dim).transpose(1, 2),
        "k": random_tensor(batch, kv, dim, keys).mT,
        "v": random_tensor(batch, keys, kv, value_dim).transpose(1, 2),
        "mask": None, "bias": None, "sinks": None, "scale": dim**-0.5, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0],
    }  # fmt: skip
    assert options.keys() <= call.keys()
    return call | options


def padding(batch: int, keys: int) -> Tensor:
    """Holes everywhere, and many at the left of the first row."""
    mask = torch.rand(batch, keys, device=DEVICE) > 0.3
    mask[0, : keys // 2] = False
    return mask.to(torch.int64)


def forward(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from fxopt.kernels.attention.triton import attention_forward

    return attention_forward(bind(**call))


def in_float64(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }
    return attention_with_lse(*wide.values())


def check(call: dict[str, Any]) -> None:
    """Within a small multiple of the reference's own rounding in the same dtype."""
    exact, exact_lse = in_float64(call)
    plain, plain_lse = attention_with_lse(*call.values())
    out, lse = forward(call)
    assert out.dtype == call["q"].dtype
    assert out.is_contiguous()
    assert not out.isnan().any()
    assert (lse == -torch.inf).equal(exact_lse == -torch.inf)
    finite = exact_lse > -torch.inf
    for actual, same_dtype, expected in (
        (out, plain, exact),
        (lse[finite], plain_lse[finite], exact_lse[finite]),
    ):
        own = (same_dtype.double() - expected).abs().max()
        error = (actual.double() - expected).abs().max()
        # Products of rounded weights (low dtypes) and online rescaling come on top.
        assert error <= 8 * own + 1e-6


@pytest.mark.parametrize(
    ("options", "masked"),
    crossed(
        [
            {"window": [9], "sink_tokens": [3]},
            {},
            {"causal": False},
            {"causal": False, "window": [9]},
            {"causal": False, "window": [9], "sink_tokens": [40]},
            {"window": [70]},
            {"window": [0, 20], "sink_tokens": [5, 2]},
            {"softcap": 2.0},
        ],
        [False, True],
    ),
)
def test_masks(options: dict[str, Any], masked: bool) -> None:
    mask = padding(2, 101) if masked else None
    check(make(2, 2, 2, 101, 101, 16, 16, mask=mask, **options))


def test_sinks_with_gaps() -> None:
    sinks = torch.randn(8, device=DEVICE)
    check(make(1, 2, 2, 33, 33, 16, 16, sinks=sinks[::2]))


@pytest.mark.parametrize("number", range(12))
def test_shapes(number: int) -> None:
    pick = random.Random(number).choice
    kv, group, keys, dim = pick([1, 3]), pick([1, 4]), pick([1, 63, 128]), pick([8, 64, 80])
    queries, batch = pick([1, keys, keys // 2 + 1]), pick([1, 2])
    heads = kv * group
    call = make(
        batch, kv, group, queries, keys, dim, pick([16, 48]),
        bias=pick([None, torch.randn(1, heads, 1, keys, device=DEVICE),
                   torch.randn(batch, 1, queries, keys, device=DEVICE)]),
        sinks=pick([None, torch.randn(heads, device=DEVICE)]),
        mask=pick([None, padding(batch, keys)]),
        causal=pick([True, False]),
        window=pick([[0], [5], [pick([0, 30, 70]) for _ in range(kv)]]),
        sink_tokens=pick([[0], [7]]),
    )  # fmt: skip
    check(call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(make(1, 2, 2, 63, 63, 64, 64, dtype=dtype))
    check(make(1, 2, 1, 63, 63, 64, 64, dtype=dtype, window=[20], sink_tokens=[2]))


def test_tiles_beyond_the_window_are_not_read() -> None:
    """NaN in the keys and values that no query sees: a kernel that reads them shows it."""
    call = make(1, 1, 1, 64, 512, 16, 16, window=[10], sink_tokens=[4])
    expected, _ = in_float64(call)
    for name in "kv":
        call[name][:, :, 64:384] = torch.nan
    torch.testing.assert_close(forward(call)[0].double(), expected, rtol=1e-4, atol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.attention.triton import _attention_forward as kernel, tiles_for

FLAGS = ("HAS_MASK", "HAS_BIAS", "HAS_SINKS", "HAS_WINDOW", "HAS_SOFTCAP")
TYPES = dict(lse_ptr="*fp32", scale="fp32", softcap="fp32") | dict.fromkeys(
    ("rank_ptr", "window_ptr", "span_ptr",
     "partial_count_ptr", "partial_ptr", "full_count_ptr", "full_ptr"), "*i32")

def build(dtype, dim, flags, lists, hopper):
    sizes = tiles_for(dim, dim, 4096, 4 if dtype == "fp32" else 2, hopper)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(CAUSAL=True, DIM=dim, VALUE_DIM=dim, UPCAST=False, q_d=1, k_d=1, v_d=1,
                     EVEN=False, SKIPS=False, LIST_M=128 * lists, LIST_N=128 * lists,
                     **{name: name in flags for name in FLAGS}, **sizes)
    signature = {
        name: "constexpr" if name in constants
        else TYPES.get(name, "*" + dtype if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    if sizes["TMA"]:
        rows = f"tensordesc<{dtype}[1, 1, {sizes['BLOCK_N']}, {dim}]>"
        signature |= {"k_ptr": rows, "v_ptr": rows}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(dtype, dim, built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"))

build("bf16", 64, FLAGS, 0, True)
build("bf16", 128, ("HAS_WINDOW",), 0, True)
build("bf16", 256, (), 1, True)
build("fp32", 64, FLAGS, 1, False)
"""


@pytest.mark.slow
def test_compiles_ahead_of_time_for_hopper() -> None:
    built = compiled(COMPILE)
    assert len(built) == 4
    assert all(int(shared) <= 227 * 1024 for *_, shared, _ in built)
    # The tensor cores' own instruction of Hopper, wherever operands have 16 bits.
    assert all((int(products) > 0) == (dtype == "bf16") for dtype, *_, products in built)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"window": [300], "sink_tokens": [16]}, {"window": [0, 100]}, {"softcap": 20.0}]
)
def test_long_inputs_on_the_device(dtype: torch.dtype, options: dict[str, Any]) -> None:
    for dim in (64, 128, 256):
        check(make(2, 2, 4, 1500, 1500, dim, dim, dtype=dtype, **options))
        check(make(2, 2, 4, 70, 1500, dim, dim, dtype=dtype, mask=padding(2, 1500), **options))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": [0, 100], "sink_tokens": [4]}, {"queries": 1}])
def test_the_op_on_the_device(options: dict[str, Any]) -> None:
    import fxopt.kernels.attention.op  # noqa: F401

    options = dict(options)
    call = make(2, 2, 4, options.pop("queries", 500), 500, 128, 128, torch.bfloat16, **options)
    exact, _ = in_float64(call)
    own = (attention_with_lse(*call.values())[0].double() - exact).abs().max()
    out = torch.ops.fxopt.attention(*call.values())
    assert out.is_contiguous()
    assert (out.double() - exact).abs().max() <= 8 * own
