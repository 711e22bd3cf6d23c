# ruff: noqa: N803 - constants of a kernel are upper case in Triton
# mypy: allow-untyped-defs
"""8-bit codes -> the dtype that the matrix units take, exactly and each once.

On NVIDIA four codes of a register at a time, in PTX:

    e4m3 -> bf16   the seven bits of a magnitude go where bf16 has the low end of its exponent; x 2^120
    e4m3 -> fp16   the same, with x 2^8
    int8 -> bf16   the byte, made unsigned, is the low end of a float32 of 2^23; less 2^23 + 128; the upper halves
    int8 -> fp16   the same in fp16, of 2^10; less 2^10 + 128

Elsewhere, and for float32, by Triton's own conversions.  Both are exact: either code has at most eight significant
bits.  NaN, of which quantised weights have none, is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies the bit patterns of bfloat16 operands (create_dot, triton 3.9): widen them there.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

# Bytes to the upper halves of 16-bit lanes; sign | magnitude >> SHIFT; times a power of two.
_E4M3 = """{{
.reg .b32 lo, hi, t, u, scale, none;
mov.b32 scale, {scale};
mov.b32 none, 0x80008000;
prmt.b32 lo, $2, 0, 0x1404;
prmt.b32 hi, $2, 0, 0x3424;
shr.u32 t, lo, {shift};
shr.u32 u, hi, {shift};
lop3.b32 lo, lo, t, 0x80008000, 0xE4;
lop3.b32 hi, hi, u, 0x80008000, 0xE4;
and.b32 lo, lo, {kept};
and.b32 hi, hi, {kept};
fma.rn.{kind}x2 $0, lo, scale, none;
fma.rn.{kind}x2 $1, hi, scale, none;
}}"""
E4M3_TO_BF16 = _E4M3.format(kind="bf16", shift=4, kept="0x87F087F0", scale="0x7B807B80")
E4M3_TO_FP16 = _E4M3.format(kind="f16", shift=1, kept="0xBF80BF80", scale="0x5C005C00")
INT8_TO_BF16 = """{
.reg .b32 x, base, f0, f1, f2, f3;
mov.b32 base, 0x4B000000;
xor.b32 x, $2, 0x80808080;
prmt.b32 f0, x, base, 0x7440;
prmt.b32 f1, x, base, 0x7441;
prmt.b32 f2, x, base, 0x7442;
prmt.b32 f3, x, base, 0x7443;
sub.f32 f0, f0, 0f4B000080;
sub.f32 f1, f1, 0f4B000080;
sub.f32 f2, f2, 0f4B000080;
sub.f32 f3, f3, 0f4B000080;
prmt.b32 $0, f0, f1, 0x7632;
prmt.b32 $1, f2, f3, 0x7632;
}"""
INT8_TO_FP16 = """{
.reg .b32 x, base, less, lo, hi;
mov.b32 base, 0x64646464;
mov.b32 less, 0x64806480;
xor.b32 x, $2, 0x80808080;
prmt.b32 lo, x, base, 0x4140;
prmt.b32 hi, x, base, 0x4342;
sub.f16x2 $0, lo, less;
sub.f16x2 $1, hi, less;
}"""
_PTX_E4M3_BF16: tl.constexpr = tl.constexpr(E4M3_TO_BF16)
_PTX_E4M3_FP16: tl.constexpr = tl.constexpr(E4M3_TO_FP16)
_PTX_INT8_BF16: tl.constexpr = tl.constexpr(INT8_TO_BF16)
_PTX_INT8_FP16: tl.constexpr = tl.constexpr(INT8_TO_FP16)


@triton.jit
def decode(codes, TO: tl.constexpr, PACKED: tl.constexpr):
    """int8 codes, or e4m3 as uint8 where PACKED and in its own type elsewhere -> TO, exactly.

    PACKED: the device runs PTX; float32 is never packed.
    """
    if PACKED and tl.bfloat16 == TO:
        if codes.dtype == tl.int8:
            return tl.inline_asm_elementwise(
                _PTX_INT8_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(_PTX_E4M3_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    if PACKED and tl.float16 == TO:
        if codes.dtype == tl.int8:
            return tl.inline_asm_elementwise(_PTX_INT8_FP16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
        return tl.inline_asm_elementwise(_PTX_E4M3_FP16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    if codes.dtype == tl.uint8:
        # float32: the fields in the low end of its exponent, times 2^120.
        wide = codes.to(tl.uint32)
        wide = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(TO)
    return codes.to(TO)


@triton.jit
def multiply(acc, w, x, PACKED: tl.constexpr):
    """``acc [M, B]`` float32 + ``w [M, K]`` x ``x [K, B]``: the core of every kernel here.

    w: floats of x's dtype, or 8-bit codes, which are decoded once each.
    """
    if INTERPRETED:
        if w.dtype == tl.uint8:
            w = decode(w, tl.float32, False)
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    if w.dtype.primitive_bitwidth == 8:
        w = decode(w, x.dtype, PACKED)
    return tl.dot(w, x, acc, input_precision="ieee")


def stored_codes(weight: Tensor, native: bool) -> Tensor:
    """The weight as a kernel takes it: e4m3fn as bytes, but where the device converts it itself (``native``)."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn and not native else weight
