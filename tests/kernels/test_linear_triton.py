"""Triton kernels of the linear ops: interpreted on a CPU, on the device where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fxopt.kernels._epilogue import Epilogue, activate
from fxopt.kernels._triton import few_rows, vector
from fxopt.kernels.low_rank_linear import low_rank_linear
from fxopt.kernels.monarch_linear import dense, monarch_linear
from fxopt.kernels.monarch_linear import op as monarch_op
from fxopt.kernels.monarch_linear import triton as monarch_triton
from fxopt.kernels.quantized_linear import dequantize, quantize, quantized_linear
from fxopt.kernels.quantized_linear import op as quantized_op
from fxopt.kernels.quantized_linear import triton as quantized_triton
from tests.kernels.ahead_of_time import compiled
from tests.kernels.linear_error import DEVICE, DTYPES, assert_close, assert_mostly_equal, draw


@DTYPES
@pytest.mark.parametrize(("bits", "group"), [(8, 63), (8, 126), (4, 42), (4, 126)])
@pytest.mark.parametrize("rows", [1, 33])
def test_quantized(dtype: torch.dtype, bits: int, group: int, rows: int) -> None:
    packed, scale, zero = quantize(draw(50, 126, dtype=dtype), bits, group)
    bias = draw(50, dtype=dtype) if rows > 1 else None
    x = draw(126, rows, dtype=dtype).T
    out = quantized_triton.quantized_linear(x, packed, scale, zero, bias, bits, group)
    exact = dequantize(packed, scale.double(), zero.double(), bits, group)
    assert_close(out, x, exact, bias)


@pytest.mark.parametrize("cut", ["whole", "transposed"])
def test_scales_beyond_the_range_of_x(cut: str) -> None:
    """As under autocast: float32 scales of which float16 keeps few bits are not rounded to it."""
    rows, chosen = CUTS[cut]
    c = chosen._replace(scale_first=True)
    packed, scale, zero = quantize(1e-4 * torch.randn(51, 640, device=DEVICE), 8, 64)
    x = draw(rows, 640, dtype=torch.float16)
    out = quantized_triton.quantized_linear(x, packed, scale, zero, None, 8, 64, c)
    assert_close(out, x, dequantize(packed, scale.double(), zero.double(), 8, 64), None)


@pytest.mark.parametrize(("bits", "group"), [(8, 63), (8, 126), (4, 42), (4, 126)])
def test_dequantize(bits: int, group: int) -> None:
    weight = quantize(draw(50, 126, dtype=torch.float32), bits, group)
    out = quantized_triton.dequantize(*weight, bits, group)
    assert torch.equal(out, dequantize(*weight, bits, group))


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 640), (4, 64), (4, 128)])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(("rows", "swapped"), [(3, False), (3, True), (17, False)])
def test_quantized_by_splits(bits: int, group: int, splits: int, rows: int, swapped: bool) -> None:
    """Sums cut evenly and unevenly, columns that end within a tile."""
    x, bias = draw(rows, 640, dtype=torch.bfloat16), draw(51, dtype=torch.bfloat16)
    packed, scale, zero = quantize(draw(51, 640, dtype=torch.bfloat16), bits, group)
    chosen = quantized_triton.Configuration(
        16 if rows < 16 else 32, 32, 32, splits, 4, 3, 2, scale_first=rows > 16, swapped=swapped
    )
    out = quantized_triton.quantized_linear(x, packed, scale, zero, bias, bits, group, chosen)
    exact = dequantize(packed, scale.double(), zero.double(), bits, group)
    assert_close(out, x, exact, bias)


@DTYPES
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("bits", "group"), [(8, 16), (8, 64), (4, 32), (4, 128)])
@pytest.mark.parametrize("block", [128, 256])
def test_quantized_vector(dtype: torch.dtype, rows: int, bits: int, group: int, block: int) -> None:
    """Steps that fill the columns and ones that do not, rows of the weight that end in a tile."""
    x, bias = draw(rows, 640, dtype=dtype), draw(51, dtype=dtype)
    packed, scale, zero = quantize(draw(51, 640, dtype=dtype), bits, group)
    chosen = vector.Vector(4, block)
    out = quantized_triton.quantized_linear(x, packed, scale, zero, bias, bits, group, chosen)
    exact = dequantize(packed, scale.double(), zero.double(), bits, group)
    assert_close(out, x, exact, bias)


ACTIVATIONS = ["", "silu", "gelu", "gelu_tanh", "relu"]
CUTS = {
    "vector": (2, vector.Vector(4, 256)),
    "whole": (5, quantized_triton.Configuration(16, 32, 32, 1, 4, 3)),
    "transposed": (17, quantized_triton.Configuration(32, 64, 32, 1, 4, 3, 2, True, True)),
    "split": (5, quantized_triton.Configuration(16, 32, 32, 3, 4, 3)),
}


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(torch.float32, "silu"), *((torch.float16, name) for name in ACTIVATIONS)],
)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("paired", "added"), [(True, False), (True, True), (False, True)])
def test_what_follows_the_product(
    dtype: torch.dtype, activation: str, cut: str, paired: bool, added: bool
) -> None:
    """No further from float64 than calls of their own, after the same sums."""
    rows, chosen = CUTS[cut]
    x, bias, up_bias = draw(rows, 640, dtype=dtype), draw(51, dtype=dtype), draw(51, dtype=dtype)
    residual = draw(51, rows, dtype=dtype).T if added else None
    first, second = (quantize(draw(51, 640, dtype=dtype) / 16, 4, 64) for _ in range(2))
    after = Epilogue(activation, residual, (*second, up_bias) if paired else None)
    out = quantized_triton.quantized_linear(x, *first, bias, 4, 64, chosen, after)
    gate, up = (
        quantized_triton.quantized_linear(x, *weight, b, 4, 64, chosen)
        for weight, b in ((first, bias), (second, up_bias))
    )
    calls = activate(gate, activation)
    exact = activate(gate.double(), activation)
    if paired:
        calls, exact = calls * up, exact * up.double()
    if residual is not None:
        calls, exact = calls + residual, exact + residual.double()
    assert out.is_contiguous()
    own = (calls.double() - exact).norm()
    # A float32 exponential of the interpreter's is as good as, but not the same as PyTorch's.
    assert (out.double() - exact).norm() <= 1.01 * own + 1e-6 * exact.norm() * (dtype.itemsize > 2)
    if dtype.itemsize == 2:
        assert_mostly_equal(out, calls)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 300])
@pytest.mark.parametrize("paired", [False, True])
def test_rows_beyond_one_launch_compose_the_same(rows: int, paired: bool) -> None:
    """What CUDA runs for any number of rows, on whatever device this is."""
    x, residual = draw(rows, 128, dtype=torch.float32), draw(rows, 51, dtype=torch.float32)
    first, second = (quantize(draw(51, 128, dtype=torch.float32), 4, 64) for _ in range(2))
    up = second if paired else (None, None, None)
    given = (x, *first, None, 4, 64, "silu", residual, *up)
    out = quantized_op._cuda(*given)  # pyright: ignore[reportPrivateUsage]
    wanted = quantized_op.reference.quantized_linear(*given)
    # Sums in another order.
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("op", ["quantized", "monarch"])
def test_a_residual_of_another_dtype_is_added_apart(op: str, rows: int) -> None:
    x, residual = draw(rows, 126, dtype=torch.float16), draw(51, rows, dtype=torch.float32).T
    cuda: Any
    if op == "quantized":
        weight: tuple[Any, ...] = quantize(draw(51, 126, dtype=torch.float16), 4, 42)
        first, cuda = (*weight, None, 4, 42), quantized_op._cuda  # pyright: ignore[reportPrivateUsage]
    else:
        right, left = draw(3, 15, 42, dtype=torch.float16), draw(3, 17, 15, dtype=torch.float16)
        first, cuda = (right, left, None), monarch_op._cuda  # pyright: ignore[reportPrivateUsage]
    out = cuda(x, *first, "silu", residual)
    assert out.is_contiguous()
    assert torch.equal(out, cuda(x, *first, "silu") + residual)


def test_two_weights_are_cut_into_narrower_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_triton, "processors", lambda _: 132)
    cuda = torch.device("cuda")
    alone, both = (
        quantized_triton.configuration(16, 14336, 4096, 4, 128, cuda, torch.bfloat16, paired)
        for paired in (False, True)
    )
    assert (alone.block_n, alone.splits) == (128, 2)
    assert (both.block_n, both.splits) == (64, 1)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 128)])
def test_quantized_by_what_is_launched(rows: int, bits: int, group: int) -> None:
    x = draw(rows, 640, dtype=torch.bfloat16)
    packed, scale, zero = quantize(draw(51, 640, dtype=torch.bfloat16), bits, group)
    out = quantized_triton.quantized_linear(x, packed, scale, zero, None, bits, group)
    exact = dequantize(packed, scale.double(), zero.double(), bits, group)
    assert_close(out, x, exact, None)


@pytest.mark.parametrize(
    ("rows", "bits", "cuts"),
    [  # as measured: tile, splits, warps, stages, transposed
        (16, 4, [(16, 64, 64, 4, 4, 4), (16, 128, 64, 2, 4, 4), (16, 64, 64, 4, 4, 4)]),
        (16, 8, [(16, 64, 128, 4, 4, 3), (16, 64, 128, 2, 4, 3), (16, 64, 128, 4, 4, 3)]),
        (32, 4, [(32, 64, 64, 2, 4, 4), (32, 64, 64, 1, 4, 4), (32, 64, 64, 2, 4, 4)]),
        (64, 4, [(-64, 64, 64, 4, 4, 4), (64, 64, 64, 1, 4, 4), (-64, 64, 64, 4, 4, 4)]),
        (256, 4, [(128, 64, 64, 2, 4, 3), (-256, 128, 64, 1, 8, 3), (-256, 128, 64, 4, 8, 3)]),
    ],
)
def test_an_h100_gets_what_was_fastest(
    monkeypatch: pytest.MonkeyPatch, rows: int, bits: int, cuts: list[tuple[int, ...]]
) -> None:
    """Tiles of negative height are those of the transpose."""
    monkeypatch.setattr(quantized_triton, "hopper", lambda _: True)
    monkeypatch.setattr(quantized_triton, "processors", lambda _: 132)
    for (k, n), cut in zip(((4096, 4096), (4096, 14336), (14336, 4096)), cuts, strict=True):
        c = quantized_triton.configuration(rows, n, k, bits, 128, torch.device("cuda"))
        assert (-c.block_m if c.swapped else c.block_m, *c[1:6]) == cut
        assert c.scale_first == (rows > 16 and (rows != 64 or not c.swapped))
        wide = quantized_triton.configuration(
            rows, n, k, bits, 128, torch.device("cuda"), torch.float32
        )
        assert not wide.swapped  # its tiles would not fit into shared memory


@DTYPES
@pytest.mark.parametrize("depth", [320, 321])
def test_few_rows(dtype: torch.dtype, depth: int) -> None:
    x, w, bias = (draw(*shape, dtype=dtype) for shape in ((3, depth), (51, depth), (51,)))
    chosen = few_rows.Configuration(32, 64)
    out = few_rows.linear(x, w, bias, x.new_empty(3, 51), chosen=chosen)
    assert_close(out, x, w.double(), bias)


@DTYPES
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("rank", [1, 7])
def test_monarch(dtype: torch.dtype, rows: int, rank: int) -> None:
    x, bias = draw(126, rows, dtype=dtype).T, draw(111, dtype=dtype)
    right, left = draw(3, 3 * rank, 42, dtype=dtype), draw(3, 37, 3 * rank, dtype=dtype)
    out = monarch_triton.monarch_linear(x, right, left, bias)
    assert_close(out, x, dense(right.double(), left.double()), bias)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_monarch(rows: int, activation: str) -> None:
    """In the store of the second product, which goes through the permutation."""
    dtype = torch.float16
    x, bias = draw(rows, 126, dtype=dtype), draw(111, dtype=dtype)
    right, left = draw(3, 21, 42, dtype=dtype) / 8, draw(3, 37, 21, dtype=dtype) / 8
    residual = draw(111, rows, dtype=dtype).T
    out = monarch_triton.monarch_linear(x, right, left, bias, Epilogue(activation, residual))
    product = monarch_triton.monarch_linear(x, right, left, bias)
    calls = activate(product, activation) + residual
    exact = activate(product.double(), activation) + residual.double()
    assert out.is_contiguous()
    assert (out.double() - exact).norm() <= 1.01 * (calls.double() - exact).norm()
    assert_mostly_equal(out, calls)


def test_no_rows() -> None:
    x = draw(2, 0, 126, dtype=torch.float32)
    packed, scale, zero = quantize(draw(50, 126, dtype=torch.float32), 4, 42)
    out = quantized_triton.quantized_linear(x, packed, scale, zero, None, 4, 42)
    assert out.shape == (2, 0, 50)
    right, left = draw(2, 8, 63, dtype=torch.float32), draw(2, 25, 8, dtype=torch.float32)
    assert monarch_triton.monarch_linear(x, right, left, None).shape == (2, 0, 50)


COMPILE = """
import subprocess, tempfile
from triton import knobs
from fxopt.kernels._triton import few_rows, splits, vector
from fxopt.kernels.low_rank_linear import triton as low_rank
from fxopt.kernels.monarch_linear import triton as monarch
from fxopt.kernels.quantized_linear import triton as quantized
from tests.kernels.ahead_of_time import build

multiples = ("N", "K", "WIDTH", "GROUPS", "SPAN", "x_batch", "x_row", "x_part")

def show(kernel, pointers, options=None, **constants):
    aligned = (*pointers, *multiples)
    built = build(kernel, pointers, aligned, options=options, **constants)
    with tempfile.NamedTemporaryFile() as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.check_output(command, text=True)
    stack = usage.partition("STACK:")[2].split()[0]
    copies = built.asm["ttgir"].count("ttg.local_alloc %")
    print(kernel.__name__, stack, copies, built.metadata.shared)

p, f, q = "*bf16", "*fp32", "*fp8e4nv"
tile = dict(UPCAST=False, BLOCK_M=16, BLOCK_N=32, BLOCK_K=64)
plain = dict(HAS_UP_BIAS=False, ACTIVATION="", PAIRED=False, HAS_RESIDUAL=False)
pair = dict(HAS_UP_BIAS=True, ACTIVATION="silu", PAIRED=True, HAS_RESIDUAL=True)
gelu = dict(HAS_UP_BIAS=False, ACTIVATION="gelu", PAIRED=False, HAS_RESIDUAL=True)
weight = dict(packed="*u8", scale=p, zero=p, bias=p)
second = dict(up_packed="*u8", up_scale=p, up_zero=p, up_bias=p)
for bits in (4, 8):
    pointers = dict(x=p, **weight, **second, residual=p, out=f)
    for after in (plain, pair):
        part = after | dict(ACTIVATION="", HAS_RESIDUAL=False)
        show(quantized._product_kernel, pointers, BITS=bits, GROUP=128, HAS_BIAS=True, SPLIT=True,
             SCALE_FIRST=False, ASM=True, OVERLAP=True, UNROLL=1, SWAPPED=False, **tile, **part)
    pointers["out"] = p
    for after in (plain, pair, gelu):
        show(quantized._product_kernel, pointers, BITS=bits, GROUP=128, HAS_BIAS=True, SPLIT=False,
             SCALE_FIRST=True, ASM=True, OVERLAP=False, UNROLL=1, SWAPPED=True,
             **tile | dict(BLOCK_N=64), **after)
        show(quantized._product_kernel, pointers | dict(scale=f, up_scale=f), BITS=bits, GROUP=128,
             HAS_BIAS=True, SPLIT=False, SCALE_FIRST=True, ASM=True, OVERLAP=False, UNROLL=1,
             SWAPPED=True, **tile | dict(BLOCK_N=64), **after)
        show(vector._vector_kernel, pointers, BITS=bits, GROUP=128, HAS_BIAS=True, ASM=True,
             CHAINED=True, RAGGED=False, ROWS=2, STAGES=1, BLOCK_N=4, BLOCK_K=2048, **after)
pointers = dict(packed="*u8", scale=p, zero=p, w=p)
show(quantized._dequantize_kernel, pointers, BITS=4, GROUP=64, BLOCK_N=32, BLOCK_K=32)
one = dict(PARTS=1, SPLITS=1, EITHER=False, EIGHTS=True)
for x, scales, after in ((p, False, plain), (q, True, plain), (q, True, pair)):
    pointers = dict(x=x, w=x, scale_m=f, scale_n=f, bias=p, y=p)
    pointers |= dict(up_x=x, up_w=x, up_scale=f, up_bias=p, residual=p)
    show(few_rows._few_rows_kernel, pointers, HAS_SCALE=scales, HAS_BIAS=True, STARTS=True,
         WAITS=True, EVEN=True, **tile, **one, **after)
none = dict(HAS_BIAS=False) | plain
either = dict(PARTS=1, SPLITS=2, EITHER=True, STARTS=True, WAITS=False, EIGHTS=True, **none)
summed = dict(PARTS=2, SPLITS=1, EITHER=False, STARTS=False, WAITS=True, EIGHTS=True, HAS_BIAS=True)
for x, y, how in ((p, f, either), (f, p, summed | gelu), (f, p, summed | pair)):
    pointers = dict(x=x, w=p, bias=p, up_x=x, up_w=p, up_bias=p, residual=p, y=y)
    show(low_rank._vector_kernel, pointers, ROWS=2, BLOCK_N=4, BLOCK_K=1024, **how)
    pointers |= dict.fromkeys(("scale_m", "scale_n", "up_scale"), f)
    show(few_rows._few_rows_kernel, pointers, dict(num_stages=5), HAS_SCALE=False, EVEN=True,
         **how, **tile | dict(BLOCK_K=128))
low_rank.processors = lambda _: 132
for rank, columns in ((1024, 4096), (2048, 1024), (2048, 4096), (1024, 8192)):
    c = low_rank.configuration(16, 4096, rank, columns, None)
    parts = 1 if c.added else c.first.splits
    of_parts = pointers | dict.fromkeys(("x", "up_x"), p if parts == 1 else f)
    how = summed | pair | dict(PARTS=parts)
    for cut, given, so in ((c.first, pointers | dict(x=p), either), (c.second, of_parts, how)):
        show(few_rows._few_rows_kernel, given, dict(num_stages=cut.stages), HAS_SCALE=False,
             EVEN=True, **so, UPCAST=False, BLOCK_M=16, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k)
pointers = dict(partial=f, bias=p, up_bias=p, residual=p, y=p)
for after in (plain, pair, gelu):
    show(splits._sum_kernel, pointers, HAS_BIAS=True, WAITS=True, STARTS=True, BLOCK=256,
         **after)
pointers = dict(x=p, w=p, bias=p, residual=p, y=p)
after = tile | dict(HAS_BIAS=True, ACTIVATION="gelu", HAS_RESIDUAL=True, EVEN=True)
show(monarch._blocks_kernel, pointers, **after)
show(monarch._blocks_kernel, pointers, bias=None,
     **after | dict(HAS_BIAS=False, ACTIVATION="", HAS_RESIDUAL=False))
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    built = compiled(COMPILE)
    assert len(built) == 45
    spilled = {name for name, stack, *_ in built if int(stack) > 0}
    assert spilled <= {"_product_kernel"}  # two 4-bit weights whose sums are split: 8 bytes
    # Weights reach the products from where they were copied to, not through a second copy.
    assert all(int(copies) == 0 for _, _, copies, _ in built)
    # What devices of capability 8.6 and 8.9 have.
    assert all(int(shared) <= 99 * 1024 for *_, shared in built)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("rows", [1, 16, 500])
def test_ops_on_the_device(dtype: torch.dtype, rows: int) -> None:
    x, bias = draw(rows, 1024, dtype=dtype), draw(500, dtype=dtype)
    for bits, group in ((8, 1024), (8, 128), (4, 64), (4, 128)):
        packed, scale, zero = quantize(draw(500, 1024, dtype=dtype), bits, group)
        exact = dequantize(packed, scale.double(), zero.double(), bits, group)
        out = quantized_linear(x, packed, scale, zero, bias, bits, group)
        assert_close(out, x, exact, bias)
    down, up = draw(128, 1024, dtype=dtype), draw(500, 128, dtype=dtype)
    out = low_rank_linear(x, down, up, bias)
    assert_close(out, x, up.double() @ down.double(), bias)
    right, left = draw(4, 128, 256, dtype=dtype), draw(4, 125, 128, dtype=dtype)
    out = monarch_linear(x, right, left, bias)
    assert_close(out, x, dense(right.double(), left.double()), bias)
