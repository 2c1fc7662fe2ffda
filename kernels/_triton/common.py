"""Jitted helpers and launch arithmetic that the kernels share."""

from functools import cache

import torch
import triton
import triton.language as tl

from . import shared_bytes

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


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may ask for; as on Hopper where kernels are interpreted."""
    return shared_bytes(device) if ASM else 227 * 1024


def stages_that_fit(wanted: int, x: int, codes: int, weight: int, device: torch.device) -> int:
    """Up to `wanted` stages of a loop over codes that leave its program enough shared memory.

    Each stage but the last has bytes of `x` and of `codes` in it, and that of one step is unpacked
    to `weight` bytes; Hopper's products read x from there, and keep the last stage's too. So Triton
    3.6 allots, beside up to 2 KiB for scales.
    """
    room = shared_memory(device) - weight - 2048
    kept = x if hopper(device) else 0
    while wanted > 1 and (wanted - 1) * (x + codes) + kept > room:
        wanted -= 1
    return wanted


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
