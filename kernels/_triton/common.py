"""Jitted helpers and launch arithmetic that the kernels share."""

import triton
import triton.language as tl

# The interpreter computes garbage for bfloat16 operands of tl.dot, so kernels upcast them there.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DOT_UPCAST: bool = INTERPRETED


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b with float32 accumulation; float32 operands are not rounded to TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def nibble(byte, PLANE: tl.constexpr):
    """The low (PLANE 0) or high (PLANE 1) four bits of unsigned bytes."""
    return (byte >> (4 * PLANE)) & 15


def tile(size: int, least: int = 16, most: int = 64) -> int:
    """A power of two that covers `size`, between `least` and `most`."""
    return max(least, min(most, triton.next_power_of_2(size)))
