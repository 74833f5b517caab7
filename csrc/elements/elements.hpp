// SPDX-License-Identifier: Apache-2.0
// Elements of the three dtypes as binary32 and back, free of branches so that loops over them
// vectorise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/cpu.hpp"
#include "core/endian.hpp"

// The GPU rounds with the same code.
#ifdef __CUDACC__
#define KV_ELEMENT __host__ __device__ KV_INLINE
#else
#define KV_ELEMENT KV_INLINE
#endif

namespace kv {

KV_ELEMENT float float_from(std::uint32_t bits) noexcept {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

KV_ELEMENT std::uint32_t bits_of(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// Nearest integer, ties to even, for |value| < 2^22: the sum has no room for a fraction.
KV_ELEMENT float nearest(float value) noexcept {
  constexpr float kShift = 0x1.8p23F;
  return (value + kShift) - kShift;
}

// One struct per dtype. `store` rounds to nearest even, overflows to infinity, and is for values
// that are no NaN.

struct BFloat16 {
  using Bits = std::uint16_t;
  static constexpr Bits kExponent = 0x7F80;
  static KV_ELEMENT float load(Bits bits) noexcept {
    return float_from(static_cast<std::uint32_t>(bits) << 16);
  }
  static KV_ELEMENT Bits store(float value) noexcept {
    const std::uint32_t bits = bits_of(value);
    return static_cast<Bits>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
  }
};

struct Float16 {
  using Bits = std::uint16_t;
  static constexpr Bits kExponent = 0x7C00;
  static KV_ELEMENT float load(Bits bits) noexcept {  // finite values only
    const std::uint32_t magnitude = bits & 0x7FFFU;
    const std::uint32_t sign = (static_cast<std::uint32_t>(bits) & 0x8000U) << 16;
    const float normal = float_from((magnitude << 13) + ((127U - 15U) << 23));
    const float denormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24F;
    return float_from(bits_of(magnitude < 0x0400U ? denormal : normal) | sign);
  }
  static KV_ELEMENT Bits store(float value) noexcept {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    // Denormals: adding 0.5 leaves the value, in units of 2^-24, rounded to even in the low
    // mantissa bits.
    const std::uint32_t denormal = bits_of(float_from(magnitude) + 0.5F) - bits_of(0.5F);
    const std::uint32_t rebased = magnitude - ((127U - 15U) << 23);
    const std::uint32_t rounded = (rebased + 0xFFFU + ((rebased >> 13) & 1U)) >> 13;
    const std::uint32_t normal = rounded < kExponent ? rounded : kExponent;
    return static_cast<Bits>((magnitude < ((127U - 14U) << 23) ? denormal : normal) | sign);
  }
};

struct Float32 {
  using Bits = std::uint32_t;
  static constexpr Bits kExponent = 0x7F800000;
  static KV_ELEMENT float load(Bits bits) noexcept { return float_from(bits); }
  static KV_ELEMENT Bits store(float value) noexcept { return bits_of(value); }
};

}  // namespace kv
