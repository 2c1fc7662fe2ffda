"""The products of experts for exporters: one operator, and what it is made of in the standard's.

How many rows an expert has is data, which a tracer follows only with a symbol an expert; the
operator's function has a loop over the experts that are hit instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.quantized_linear.reference import dequantize

OPERATOR = "ai.fxopt::GroupedMatMul"
FUNCTION = """
<domain: "ai.fxopt", opset_import: ["": 23]>
GroupedMatMul (x, weight, offsets) => (y)
{
    zero = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    most = Constant <value_ints = [9223372036854775807]> ()
    yes = Constant <value_int = 1> ()
    always = Cast <to = 9> (yes)

    ends = Cast <to = 7> (offsets)
    earlier = Slice (ends, zero, last, zero)
    starts = Concat <axis = 0> (zero, earlier)
    counts = Sub (ends, starts)
    nonzero = NonZero (counts)
    hit = Squeeze (nonzero, zero)
    trips = Size (hit)

    all_rows = Shape <start = 0, end = 1> (x)
    known_rows = Slice (ends, last, most, zero)
    other_rows = Sub (all_rows, known_rows)
    columns = Shape <start = 2, end = 3> (weight)
    shape = Concat <axis = 0> (other_rows, columns)
    floats = ConstantOfShape (shape)
    beyond = CastLike (floats, x)

    empty = SequenceConstruct (beyond)
    parts = Loop (trips, always, empty) <
        body = each (int64 i, bool on, before) => (bool more, after)
    {
        more = Identity (on)
        expert = Gather (hit, i)
        index = Unsqueeze (expert, zero)
        start = Gather (starts, index)
        end = Gather (ends, index)
        rows = Slice (x, start, end, zero)
        matrix = Gather (weight, expert)
        product = MatMul (rows, matrix)
        after = SequenceInsert (before, product, i)
    }>
    y = ConcatFromSequence <axis = 0> (parts)
}
"""
"""`OPERATOR` in the text format of ONNX; of x's dtype, whichever that is."""


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`aten::_grouped_mm` of x [rows, in], sorted by expert, with weight [experts, in, out], which
    an exporter sees as one `OPERATOR`.

    Rows up to offs[e], int32 or int64 [experts], are those of expert e and of the ones before it;
    rows beyond the last give zeros. The result [rows, out] is in x's dtype or `out_dtype`.
    ValueError for the op's other products: of several x, of groups that are no rows, with a bias.
    """
    if offs is None or bias is not None or (x.dim(), weight.dim()) != (2, 3):
        raise ValueError(
            f"grouped_mm: x of {x.dim()} and weights of {weight.dim()} dimensions "
            f"{'without' if bias is None else 'with'} a bias; only rows sorted by expert times "
            "stacked weights, with offsets and without a bias, can be exported"
        )
    shape = (x.shape[0], weight.shape[2])
    if torch.compiler.is_exporting():
        operands = (x, weight, offs)
        y: Tensor = torch.onnx.ops.symbolic(
            OPERATOR, operands, dtype=x.dtype, shape=shape, version=1
        )
    else:
        y, start = x.new_zeros(shape), 0
        for expert, end in enumerate(offs.tolist()):
            y[start:end] = x[start:end] @ weight[expert]
            start = end
    return y if out_dtype is None else y.to(out_dtype)


def quantized_experts_onnx(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """`reference.quantized_experts` by `grouped_mm`; all weights are dequantised for the call."""
    return grouped_mm(x, dequantize(packed, scale, zero, bits, group_size).mT, offsets)
