"""Jitted helpers and launch arithmetic that the kernels share."""

from functools import cache

import torch
import triton
import triton.language as tl

# The interpreter computes garbage for bfloat16 operands of tl.dot, so kernels upcast them there.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DOT_UPCAST: bool = INTERPRETED
# The interpreter runs no PTX.
ASM: bool = not INTERPRETED and torch.version.hip is None


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it drains (from capability 9.0 on)."""
    return ASM and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def hopper(device: torch.device) -> bool:
    """Whether tensor cores take their first operand from registers (capability 9.0)."""
    return ASM and torch.cuda.get_device_capability(device)[0] == 9


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; as many as Hopper has where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if ASM else 132


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b with float32 accumulation; float32 operands are not rounded to TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def tile(size: int, least: int = 16, most: int = 64) -> int:
    """A power of two that covers `size`, between `least` and `most`."""
    return max(least, min(most, triton.next_power_of_2(size)))
