"""Integer codes to floating point without conversions.

Hardware converts integers at a quarter of the arithmetic rate, one element at a time. Instead the
exponent of 2^m, m the width of a mantissa, is put before the codes of four bytes at once, which
makes them 2^m + code, and 2^m + zero is taken off. Both steps are exact.
"""

import triton
import triton.language as tl


def _ptx(mask: bool, shift: int, exponent: int, one: int, kind: str) -> tl.constexpr:
    """Four bytes in $2, -(2^m + zero) of each in $3 and $4; pairs of 16-bit numbers in $0, $1."""
    select = f"shr.u32 t, $2, {shift}; and.b32 t, t, 0x0f0f0f0f;" if mask else "mov.b32 t, $2;"
    return tl.constexpr(
        f"{{ .reg .b32 t, a, b, e, u; {select} mov.b32 e, {exponent:#010x}; mov.b32 u, {one:#010x};"
        " prmt.b32 a, t, e, 0x4140; prmt.b32 b, t, e, 0x4342;"
        f" fma.rn.{kind}x2 $0, a, u, $3; fma.rn.{kind}x2 $1, b, u, $4; }}"
    )


BF16_LOW = _ptx(True, 0, 0x43434343, 0x3F803F80, "bf16")
BF16_HIGH = _ptx(True, 4, 0x43434343, 0x3F803F80, "bf16")
FP16_LOW = _ptx(True, 0, 0x64646464, 0x3C003C00, "f16")
FP16_HIGH = _ptx(True, 4, 0x64646464, 0x3C003C00, "f16")
FP16_BYTE = _ptx(False, 0, 0x64646464, 0x3C003C00, "f16")
# The mantissa of bfloat16 is too short for eight bits: by way of float32, $3 to $6 in float32.
BF16_BYTE = tl.constexpr(
    "{ .reg .b32 e; .reg .f32 a, b, c, d; mov.b32 e, 0x4b000000;"
    " prmt.b32 a, $2, e, 0x7440; prmt.b32 b, $2, e, 0x7441;"
    " prmt.b32 c, $2, e, 0x7442; prmt.b32 d, $2, e, 0x7443;"
    " add.f32 a, a, $3; add.f32 b, b, $4; add.f32 c, c, $5; add.f32 d, d, $6;"
    " cvt.rn.bf16x2.f32 $0, b, a; cvt.rn.bf16x2.f32 $1, d, c; }"
)


@triton.jit
def nibble(byte, PLANE: tl.constexpr):
    """The low (PLANE 0) or high (PLANE 1) four bits of unsigned bytes."""
    return (byte >> (4 * PLANE)) & 15


@triton.jit
def centred(
    byte, zero, dtype: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr
):
    """The codes of BITS in plane PLANE of unsigned bytes less `zero`, an integer, in `dtype`.

    ASM asks that four consecutive bytes lie in one thread, which Triton sees to.
    """
    if ASM and dtype == tl.bfloat16:
        if BITS == 8:
            return tl.inline_asm_elementwise(
                BF16_BYTE, "=r,=r,r,r,r,r,r", [byte, -8388608.0 - zero.to(tl.float32)],
                dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            BF16_HIGH if PLANE else BF16_LOW, "=r,=r,r,r,r",
            [byte, (-128.0 - zero.to(tl.float32)).to(tl.bfloat16)],
            dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    if ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_BYTE if BITS == 8 else (FP16_HIGH if PLANE else FP16_LOW), "=r,=r,r,r,r",
            [byte, (-1024.0 - zero.to(tl.float32)).to(tl.float16)],
            dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    code = byte
    if BITS == 4:
        code = nibble(byte, PLANE)
    return (code.to(tl.float32) - zero.to(tl.float32)).to(dtype)


def _offset(shift: int, bits: int) -> tl.constexpr:
    """Four bytes in $4 to four float32 in $0 to $3, each an offset and the code."""
    select = f"shr.u32 t, $4, {shift}; and.b32 t, t, 0x0f0f0f0f;" if bits == 4 else "mov.b32 t, $4;"
    places = ("7044", "7144", "7244", "7344") if bits == 4 else ("7404", "7414", "7424", "7434")
    words = " ".join(f"prmt.b32 ${i}, t, e, 0x{p};" for i, p in enumerate(places))
    exponent = 0x43000000 if bits == 4 else 0x47000000
    return tl.constexpr(f"{{ .reg .b32 t, e; {select} mov.b32 e, {exponent:#010x}; {words} }}")


OFFSET_LOW, OFFSET_HIGH, OFFSET_BYTE = _offset(0, 4), _offset(4, 4), _offset(0, 8)
BIAS = tl.constexpr({4: 128, 8: 32768})
"""What `biased` adds: float32 whose mantissa has the code in a byte of its own."""


@triton.jit
def biased(byte, BITS: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr):
    """The codes in plane PLANE of unsigned bytes in float32, with ASM plus BIAS[BITS]; exact."""
    if ASM:
        return tl.inline_asm_elementwise(
            OFFSET_BYTE if BITS == 8 else (OFFSET_HIGH if PLANE else OFFSET_LOW),
            "=r,=r,=r,=r,r", [byte], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    code = byte
    if BITS == 4:
        code = nibble(byte, PLANE)
    return code.to(tl.float32)


# With -0 as the addend: older devices only multiply pairs of bfloat16 while they add.
BF16_PRODUCT = tl.constexpr("{ .reg .b32 n; mov.b32 n, 0x80008000; fma.rn.bf16x2 $0, $1, $2, n; }")


@triton.jit
def scaled(w, scale, ASM: tl.constexpr):
    """w * scale, rounded to w's dtype once; the interpreter cannot multiply bfloat16. The scale may
    be of another dtype, whose range float16 does not have."""
    if ASM and w.dtype == tl.bfloat16 and scale.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BF16_PRODUCT, "=r,r,r", [w, scale], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return (w.to(tl.float32) * scale.to(tl.float32)).to(w.dtype)
