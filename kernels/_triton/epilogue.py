"""What a kernel does to a product before it stores it: `kernels/_epilogue.py` in Triton."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .common import INTERPRETED

LIBRARY = tl.constexpr(not INTERPRETED)
"""Whether exponentials are those that PyTorch's kernels call; the interpreter has none."""


@triton.jit
def _exp(b_x):
    return libdevice.exp(b_x) if LIBRARY else tl.exp(b_x)


@triton.jit
def activated(b_x, ACTIVATION: tl.constexpr):
    """The activation of float32 numbers; `ACTIVATION` is not empty."""
    if ACTIVATION == "silu":
        return tl.div_rn(b_x, 1.0 + _exp(-b_x))
    elif ACTIVATION == "gelu":
        return b_x * 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        b_z = 0.7978845608028654 * (b_x + 0.044715 * b_x * b_x * b_x)
        # 1 + tanh(z) = 2 / (1 + exp(-2 z))
        return tl.div_rn(b_x, 1.0 + _exp(-2.0 * b_z))
    else:
        # A comparison, since a maximum would lose NaN.
        return tl.where(b_x < 0.0, 0.0, b_x)


@triton.jit
def finished(
    b_y, b_up, residual, mask, dtype: tl.constexpr,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums in float32 as they are stored: the activation of `b_y`, PAIRED times `b_up`, and with
    HAS_RESIDUAL plus what the pointers `residual` show, each rounded to `dtype`."""
    b_y = b_y.to(dtype)
    if ACTIVATION != "":
        b_y = activated(b_y.to(tl.float32), ACTIVATION).to(dtype)
    if PAIRED:
        b_y = (b_y.to(tl.float32) * b_up.to(dtype).to(tl.float32)).to(dtype)
    if HAS_RESIDUAL:
        b_r = tl.load(residual, mask=mask, other=0.0)
        b_y = (b_y.to(tl.float32) + b_r.to(tl.float32)).to(dtype)
    return b_y
