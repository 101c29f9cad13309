"""Functions that run inside Triton kernels, right in the interpreter and compiled.

Triton's own tl.exp is ex2.approx(x * log2(e)), whose error grows with |x| (1e-6 relative at -20); gate weights are held
to fp32 rounding, so these reduce the range first. None of them uses an instruction that the interpreter lacks.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels are interpreted: bf16 arithmetic is an error there (and a bf16 dot silently wrong), so a kernel that
# would compute in bf16 upcasts after its loads when this is set.
INTERPRET: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 accumulation, without TF32; right for bf16 in the interpreter too."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x rounded to nearest even in dtype, as the compiled cast does; the interpreter's bf16 cast truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # NaN stays NaN
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def exp_nonpositive(x):
    """e^x for fp32 x <= 0 or NaN, within 2 ulp; 0 below -87.3."""
    # x = n ln2 + r with |r| <= ln2 / 2. ln2 is split so that n * hi is exact; adding 1.5 * 2^23 rounds to an integer.
    n = (x * 1.4426950408889634 + 12582912.0) - 12582912.0
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    y = tl.exp2(n) * tl.exp2(r * 1.4426950408889634)
    return tl.where(x < -87.3, 0.0, y)  # -inf too, where r is NaN


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in fp32; NaN for NaN."""
    z = exp_nonpositive(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def softplus(x):
    """log(1 + e^x) in fp32, relative error about 2e-7; NaN for NaN."""
    # log1p(z) = 2 atanh(s), s = z / (2 + z) <= 1/3; the first term left out is below 3e-9 of the sum. lg2.approx would
    # lose every digit of a small log1p.
    z = exp_nonpositive(-tl.abs(x))
    s = z / (2.0 + z)
    s2 = s * s
    p = 1.0 / 15.0
    p = p * s2 + 1.0 / 13.0
    p = p * s2 + 1.0 / 11.0
    p = p * s2 + 1.0 / 9.0
    p = p * s2 + 1.0 / 7.0
    p = p * s2 + 1.0 / 5.0
    p = p * s2 + 1.0 / 3.0
    p = p * s2 + 1.0
    return tl.where(x < 0, 0.0, x) + 2.0 * s * p


@triton.jit
def ordered_key(x):
    """int32 keys in the order of fp32 x: NaN and -inf as the lowest finite value, -0.0 as 0.0; always > -2^31."""
    lowest = -3.4028234663852886e38
    x = tl.where(x >= lowest, x, lowest)
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def key_value(key):
    """The fp32 value whose ordered_key this is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
