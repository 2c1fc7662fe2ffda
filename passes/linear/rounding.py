"""Weights rounded so that later columns make up for the rounding of earlier ones.

Errors are tr(D C DT) = E‖D x‖² for a change D of the weight and the gram C = E[x xT], as in
`projection`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.kernels.fp8_linear import reference as fp8
from fxopt.kernels.quantized_linear import reference as integer
from fxopt.passes.linear import projection

DAMPING = 3e-3
BLOCK = 128
"""Columns whose effect on all later ones is applied at once."""

CHUNK = 2**26
"""Numbers of a weight that are rounded at once: a head of 128k rows would take 20 GiB."""

Nearest = Callable[[int, Tensor], Tensor]
"""(column, values [out] float32) -> the nearest values that can be stored in that column."""


@dataclass(frozen=True)
class Rounding:
    """What propagation needs of the inputs: columns in `order` of their energy, `gram` as it was
    given, and the Cholesky `factor` of its inverse in that order, float32."""

    gram: Tensor
    order: Tensor
    factor: Tensor

    @staticmethod
    def of(gram: Tensor) -> Rounding:
        order = gram.diagonal().argsort(descending=True)
        sorted_ = projection.damped(gram, DAMPING)[order][:, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_))
        return Rounding(gram, order, torch.linalg.cholesky(inverse).float())


def quantize(
    weight: Tensor, inputs: Rounding | None, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`packed`, `scale`, `zero` for `quantized_linear`: the better of `propagated` and rounding
    to nearest; the latter without inputs. Rows do not depend on each other, and `CHUNK` numbers
    are taken at a time."""
    rows = max(1, CHUNK // weight.shape[1])
    if len(weight) > rows:
        parts = [quantize(part, inputs, bits, group_size) for part in weight.split(rows)]
        packed, scale, zero = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
        return packed, scale, zero
    scale, zero = integer.grid(weight, bits, group_size)
    if inputs is None:
        codes = integer.encode(weight, scale, zero, bits)
        return integer.pack(codes, bits, group_size), scale, zero
    steps, offsets = scale.float().T.contiguous(), zero.float().T.contiguous()

    def nearest(column: int, values: Tensor) -> Tensor:
        step, offset = steps[column // group_size], offsets[column // group_size]
        codes = (torch.round(values / step) + offset).clamp_(0, 2**bits - 1)
        return (codes - offset) * step

    def loss(codes: Tensor) -> Tensor:
        packed = integer.pack(codes, bits, group_size)
        restored = integer.dequantize(packed, scale.double(), zero.double(), bits, group_size)
        return projection.error(restored - weight.double(), inputs.gram)

    fitted = integer.encode(propagated(weight, inputs, nearest), scale, zero, bits)
    codes = min((integer.encode(weight, scale, zero, bits), fitted), key=loss)
    return integer.pack(codes, bits, group_size), scale, zero


def quantize_fp8(weight: Tensor, inputs: Rounding | None) -> tuple[Tensor, Tensor]:
    """`weight` e4m3 and `scale` float32 for `fp8_linear`: the better of `propagated` and rounding
    to nearest; the latter without inputs."""
    scale = fp8.row_scale(weight)
    if inputs is None:
        return fp8.quantize(weight, scale), scale[:, 0].contiguous()

    def nearest(column: int, values: Tensor) -> Tensor:
        return fp8.quantize(values[:, None], scale)[:, 0].float() * scale[:, 0]

    def loss(stored: Tensor) -> Tensor:
        return projection.error(fp8.dequantize(stored, scale[:, 0]) - weight.float(), inputs.gram)

    fitted = fp8.quantize(propagated(weight, inputs, nearest), scale)
    return min((fp8.quantize(weight, scale), fitted), key=loss), scale[:, 0].contiguous()


def propagated(weight: Tensor, inputs: Rounding, nearest: Nearest) -> Tensor:
    """float32 [out, in] of values that can be stored (GPTQ, Frantar et al. 2023).

    Columns are taken in order of their inputs' energy, so that the loudest are rounded while the
    most others can still make up for it. Everything is held transposed: a column is contiguous.
    """
    columns, factor = inputs.order.tolist(), inputs.factor
    rest = weight.float().T[inputs.order]
    rounded = torch.zeros_like(rest)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        lost = torch.zeros_like(rest[start:stop])
        for i in range(start, stop):
            rounded[columns[i]] = nearest(columns[i], rest[i])
            lost[i - start] = (rest[i] - rounded[columns[i]]) / factor[i, i]
            rest[i:stop].addr_(factor[i:stop, i], lost[i - start], alpha=-1.0)
        rest[stop:] -= factor[stop:, start:stop] @ lost
    return rounded.T.contiguous()
