"""Integer weights of several experts: against each row by itself in float64; op; Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.quantized_experts import REFERENCE, grouped_mm, quantized_experts
from fxopt.kernels.quantized_experts.onnx import FUNCTION
from fxopt.kernels.quantized_linear import dequantize, quantize
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = pytest.mark.parametrize(("bits", "group"), [(8, 63), (8, 126), (4, 42), (4, 126)])
COUNTS = [[5, 0, 1, 17], [0, 0, 23, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def stacked(dtype: torch.dtype, bits: int, group: int, experts: int = 4) -> list[Tensor]:
    weight = torch.randn(experts * 50, 126, device=DEVICE).to(dtype)
    return [t.unflatten(0, (experts, 50)) for t in quantize(weight, bits, group)]


def by_row(x: Tensor, codes: list[Tensor], counts: list[int], bits: int, group: int) -> Tensor:
    """float64, row by row; those that no expert has are zero."""
    packed, scale, zero = codes[0], codes[1].double(), codes[2].double()
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [
        dequantize(packed[e], scale[e], zero[e], bits, group) @ row.double()
        for e, row in zip(owner, x, strict=False)
    ]
    rest = x.new_zeros((len(x) - len(owner), 50), dtype=torch.float64)
    return torch.cat([torch.stack(rows), rest]) if rows else rest


def assert_close(out: Tensor, exact: Tensor, x: Tensor) -> None:
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    allowed = 20 * torch.finfo(x.dtype).eps * exact.norm() + 1e-30
    assert (out.double() - exact).norm() <= allowed


@FORMATS
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_row_meets_its_expert(
    dtype: torch.dtype, counts: list[int], bits: int, group: int
) -> None:
    codes = stacked(dtype, bits, group)
    x = torch.randn(126, sum(counts) + 2, device=DEVICE).to(dtype).T
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0)
    for kind in (torch.int32, torch.int64):
        for spelling in (quantized_experts, REFERENCE):
            out = spelling(x, *codes, offsets.to(kind), bits, group)
            assert_close(out, by_row(x, codes, counts, bits, group), x)
            assert not out[sum(counts) :].any()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_exporters_see_in_onnxruntime(dtype: torch.dtype, counts: list[int]) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    name = {torch.float32: "float", torch.float16: "float16"}[dtype]
    graph = onnx.parser.parse_graph(
        f"g ({name}[r, i] x, {name}[e, i, o] weight, int32[e] offsets) => ({name}[r, o] y) "
        "{ y = ai.fxopt.GroupedMatMul (x, weight, offsets) }"
    )
    domains = [onnx.helper.make_opsetid(*one) for one in (("", 23), ("ai.fxopt", 1))]
    model = onnx.helper.make_model(
        graph,
        functions=[onnx.parser.parse_function(FUNCTION)],
        opset_imports=domains,
        ir_version=10,
    )
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {
        "x": torch.randn(sum(counts) + 2, 126).to(dtype),
        "weight": torch.randn(4, 126, 50).to(dtype),
        "offsets": torch.tensor(counts).cumsum(0).int(),
    }
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    out, (x, weight, offsets) = torch.from_numpy(found), given.values()
    owner = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)]).long()
    rows = torch.einsum("ri,rio->ro", x[: sum(counts)].double(), weight[owner].double())
    exact = torch.cat([rows, torch.zeros(2, 50)])
    assert_close(out, exact, x)
    assert not out[sum(counts) :].any()
    assert_close(grouped_mm(x, weight, offsets), exact, x)
    wider = grouped_mm(x.to(torch.bfloat16), weight.bfloat16(), offsets, out_dtype=torch.float32)
    assert wider.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "weight", "offsets"),
    [((6, 4), (4, 5), True), ((2, 3, 4), (2, 4, 5), False), ((2, 3, 4), (4, 5), True)],
)
def test_groups_of_another_dimension_are_not_exported(
    x: tuple[int, ...], weight: tuple[int, ...], offsets: bool
) -> None:
    given = torch.tensor([2, 4]) if offsets else None
    with pytest.raises(ValueError, match="only rows sorted by expert times stacked weights"):
        grouped_mm(torch.randn(x), torch.randn(weight), given)
    with pytest.raises(ValueError, match="with a bias"):
        grouped_mm(torch.randn(3, 4), torch.randn(2, 4, 5), torch.tensor([1, 3]), torch.randn(2, 5))


def test_gradient_of_the_rows() -> None:
    codes = [t.double() if t.is_floating_point() else t for t in stacked(torch.float64, 4, 42)]
    x = torch.randn(8, 126, dtype=torch.float64, device=DEVICE, requires_grad=True)
    offsets = torch.tensor([3, 3, 4, 7], device=DEVICE)

    def call(x: Tensor) -> Tensor:
        return quantized_experts(x, *codes, offsets, 4, 42)

    assert torch.autograd.gradcheck(call, (x,))


@pytest.mark.parametrize(("bits", "group"), [(8, 126), (4, 42)])
def test_opcheck(bits: int, group: int) -> None:
    codes = stacked(torch.float32, bits, group)
    x = torch.randn(9, 126, device=DEVICE, requires_grad=True)
    offsets = torch.tensor([3, 3, 4, 8], device=DEVICE, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.fxopt.quantized_experts.default, (x, *codes, offsets, bits, group)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(2, 84)},
        {"x": torch.randn(126)},
        {"offsets": torch.tensor([1, 2])},
        {"group_size": 126},
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any]) -> None:
    packed, scale, zero = (t.cpu() for t in stacked(torch.float32, 4, 42))
    call: dict[str, Any] = {
        "x": torch.randn(2, 126), "packed": packed, "scale": scale, "zero": zero,
        "offsets": torch.tensor([1, 1, 2, 2]), "bits": 4, "group_size": 42,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"do not fit|must divide"):
        quantized_experts(**call | change)


@FORMATS
@pytest.mark.parametrize("counts", [*COUNTS, [40, 0, 70, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton(dtype: torch.dtype, counts: list[int], bits: int, group: int) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.quantized_experts import triton

    codes = stacked(dtype, bits, group)
    x = torch.randn(126, sum(counts) + 2, device=DEVICE).to(dtype).T
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    out = triton.quantized_experts(x, *codes, offsets, bits, group)
    assert_close(out, by_row(x, codes, counts, bits, group), x)
    assert not out[sum(counts) :].any()


COMPILE = """
from fxopt.kernels.quantized_experts.triton import _experts_kernel as kernel
from tests.kernels.ahead_of_time import build

for bits in (4, 8):
    constants = dict(
        BITS=bits, GROUP=128, ASM=True, UPCAST=False, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64
    )
    floats = dict.fromkeys(("x", "scale", "zero", "out"), "*bf16")
    pointers = {**floats, "packed": "*u8", "offsets": "*i32"}
    assert build(kernel, pointers, **constants).asm["cubin"]
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    compiled(COMPILE)


@pytest.mark.gpu
def test_a_graph_replays_with_other_offsets() -> None:
    """How many rows an expert has is read by the kernel, not when it is launched."""
    codes = stacked(torch.bfloat16, 4, 42)
    x = torch.randn(23, 126, device="cuda").bfloat16()
    offsets = torch.tensor(COUNTS[0], device="cuda").cumsum(0)
    quantized_experts(x, *codes, offsets, 4, 42)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_experts(x, *codes, offsets, 4, 42)
    for counts in COUNTS[1:]:
        offsets.copy_(torch.tensor(counts).cumsum(0))
        graph.replay()
        assert_close(out, by_row(x, codes, counts, 4, 42), x)
