// Storage types and their conversion to and from fp32; the same on the CPU and on a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MOEKERN_HD __host__ __device__ __forceinline__
#else
#define MOEKERN_HD inline
#endif

namespace moekern {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

MOEKERN_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

MOEKERN_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

MOEKERN_HD float to_float(float v) { return v; }
MOEKERN_HD float to_float(bfloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

MOEKERN_HD float to_float(float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  // The exponent is re-biased by a multiplication, which also normalises subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

template <class T>
MOEKERN_HD T from_float(float v);

template <>
MOEKERN_HD float from_float<float>(float v) {
  return v;
}

// Round to nearest even; a NaN keeps its sign and becomes quiet.
template <>
MOEKERN_HD bfloat16 from_float<bfloat16>(float v) {
  const uint32_t bits = float_to_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
MOEKERN_HD float16 from_float<float16>(float v) {
  const uint32_t bits = float_to_bits(v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  uint32_t half;
  if (rest < 0x38800000u) {  // subnormal: let the adder round at the right bit
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace moekern
