// SPDX-License-Identifier: Apache-2.0
// The loops of coding q8 for the three dtypes, compiled for the baseline and for AVX2.
#include "codec/quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/cpu.hpp"
#include "core/endian.hpp"

namespace kv {
namespace {

constexpr float kMaxCode = 127.0F;
// Below this a scale would leave the range of normal floats, where rounding differs with the
// flush-to-zero mode.
constexpr float kSmallestMagnitude = 0x1p-100F;

KV_INLINE float from_bits(std::uint32_t bits) noexcept {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

KV_INLINE std::uint32_t to_bits(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// One struct per dtype: how elements are loaded, stored and recognised as finite. `load` and
// `store` are for finite values only, and free of branches so that loops over them vectorise.
struct BFloat16 {
  using Bits = std::uint16_t;
  static constexpr Bits kExponent = 0x7F80;
  static constexpr float kLargest = 0x1.FEp127F;
  static KV_INLINE float load(Bits bits) noexcept {
    return from_bits(static_cast<std::uint32_t>(bits) << 16);
  }
  static KV_INLINE Bits store(float value) noexcept {
    const std::uint32_t bits = to_bits(value);
    return static_cast<Bits>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
  }
};

struct Float16 {
  using Bits = std::uint16_t;
  static constexpr Bits kExponent = 0x7C00;
  static constexpr float kLargest = 65504.0F;
  static KV_INLINE float load(Bits bits) noexcept {
    const std::uint32_t magnitude = bits & 0x7FFFU;
    const std::uint32_t sign = (static_cast<std::uint32_t>(bits) & 0x8000U) << 16;
    const float normal = from_bits((magnitude << 13) + ((127U - 15U) << 23));
    const float denormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24F;
    return from_bits(to_bits(magnitude < 0x0400U ? denormal : normal) | sign);
  }
  static KV_INLINE Bits store(float value) noexcept {
    const std::uint32_t bits = to_bits(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    // Denormals: adding 0.5 leaves the value, in units of 2^-24, rounded to even in the low
    // mantissa bits.
    const std::uint32_t denormal = to_bits(from_bits(magnitude) + 0.5F) - to_bits(0.5F);
    const std::uint32_t rebased = magnitude - ((127U - 15U) << 23);
    const std::uint32_t normal = (rebased + 0xFFFU + ((rebased >> 13) & 1U)) >> 13;
    return static_cast<Bits>((magnitude < ((127U - 14U) << 23) ? denormal : normal) | sign);
  }
};

struct Float32 {
  using Bits = std::uint32_t;
  static constexpr Bits kExponent = 0x7F800000;
  static constexpr float kLargest = std::numeric_limits<float>::max();
  static KV_INLINE float load(Bits bits) noexcept { return from_bits(bits); }
  static KV_INLINE Bits store(float value) noexcept { return to_bits(value); }
};

// Nearest integer, ties to even, for |value| < 2^22: the sum has no room for a fraction.
KV_INLINE float nearest(float value) noexcept {
  constexpr float kShift = 0x1.8p23F;
  return (value + kShift) - kShift;
}

template <typename Type>
KV_INLINE bool finite_any(const std::uint8_t* source, std::size_t count) noexcept {
  using Bits = typename Type::Bits;
  unsigned found = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const auto bits = load_le<Bits>(source + i * sizeof(Bits));
    found |= static_cast<Bits>(bits & Type::kExponent) == Type::kExponent ? 1U : 0U;
  }
  return found == 0;
}

template <typename Type>
KV_INLINE void quantize_any(const std::uint8_t* source,
                            std::size_t rows,
                            std::size_t dim,
                            std::uint8_t* scales,
                            std::uint8_t* codes) noexcept {
  using Bits = typename Type::Bits;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint8_t* elements = source + row * dim * sizeof(Bits);
    // Finite magnitudes order like their bits without the sign, and integers reduce in any order.
    Bits largest_bits = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      const auto bits = load_le<Bits>(elements + i * sizeof(Bits));
      largest_bits =
          std::max(largest_bits, static_cast<Bits>(bits & (std::numeric_limits<Bits>::max() >> 1)));
    }
    const float largest = Type::load(largest_bits);
    const bool is_zero = largest < kSmallestMagnitude;
    const float inverse = is_zero ? 0.0F : kMaxCode / largest;
    store_le<float>(scales + row * sizeof(float), is_zero ? 0.0F : largest / kMaxCode);
    for (std::size_t i = 0; i < dim; ++i) {
      const float value = Type::load(load_le<Bits>(elements + i * sizeof(Bits)));
      const float code = std::min(std::max(nearest(value * inverse), -kMaxCode), kMaxCode);
      codes[row * dim + i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
    }
  }
}

template <typename Type>
KV_INLINE bool dequantize_any(const std::uint8_t* scales,
                              const std::uint8_t* codes,
                              std::size_t rows,
                              std::size_t dim,
                              std::uint8_t* destination) noexcept {
  using Bits = typename Type::Bits;
  for (std::size_t row = 0; row < rows; ++row) {
    const auto scale = load_le<float>(scales + row * sizeof(float));
    unsigned violations = scale >= 0.0F && scale <= Float32::kLargest ? 0U : 1U;
    for (std::size_t i = 0; i < dim; ++i) {
      violations |= codes[row * dim + i] == 0x80U ? 1U : 0U;
    }
    if (violations != 0) {
      return false;
    }
    for (std::size_t i = 0; i < dim; ++i) {
      const auto code = static_cast<std::int8_t>(codes[row * dim + i]);
      const float value =
          std::min(std::max(static_cast<float>(code) * scale, -Type::kLargest), Type::kLargest);
      store_le<Bits>(destination + (row * dim + i) * sizeof(Bits), Type::store(value));
    }
  }
  return true;
}

KV_INLINE bool finite_dispatch(const std::uint8_t* source,
                               std::size_t count,
                               DType dtype) noexcept {
  switch (dtype) {
    case DType::kBFloat16:
      return finite_any<BFloat16>(source, count);
    case DType::kFloat16:
      return finite_any<Float16>(source, count);
    case DType::kFloat32:
      break;
  }
  return finite_any<Float32>(source, count);
}

KV_INLINE void quantize_dispatch(const std::uint8_t* source,
                                 std::size_t rows,
                                 std::size_t dim,
                                 DType dtype,
                                 std::uint8_t* scales,
                                 std::uint8_t* codes) noexcept {
  switch (dtype) {
    case DType::kBFloat16:
      quantize_any<BFloat16>(source, rows, dim, scales, codes);
      break;
    case DType::kFloat16:
      quantize_any<Float16>(source, rows, dim, scales, codes);
      break;
    case DType::kFloat32:
      quantize_any<Float32>(source, rows, dim, scales, codes);
      break;
  }
}

KV_INLINE bool dequantize_dispatch(const std::uint8_t* scales,
                                   const std::uint8_t* codes,
                                   std::size_t rows,
                                   std::size_t dim,
                                   DType dtype,
                                   std::uint8_t* destination) noexcept {
  switch (dtype) {
    case DType::kBFloat16:
      return dequantize_any<BFloat16>(scales, codes, rows, dim, destination);
    case DType::kFloat16:
      return dequantize_any<Float16>(scales, codes, rows, dim, destination);
    case DType::kFloat32:
      break;
  }
  return dequantize_any<Float32>(scales, codes, rows, dim, destination);
}

#ifdef KV_X86
KV_TARGET_AVX2 bool finite_avx2(const std::uint8_t* source,
                                std::size_t count,
                                DType dtype) noexcept {
  return finite_dispatch(source, count, dtype);
}

KV_TARGET_AVX2 void quantize_avx2(const std::uint8_t* source,
                                  std::size_t rows,
                                  std::size_t dim,
                                  DType dtype,
                                  std::uint8_t* scales,
                                  std::uint8_t* codes) noexcept {
  quantize_dispatch(source, rows, dim, dtype, scales, codes);
}

KV_TARGET_AVX2 bool dequantize_avx2(const std::uint8_t* scales,
                                    const std::uint8_t* codes,
                                    std::size_t rows,
                                    std::size_t dim,
                                    DType dtype,
                                    std::uint8_t* destination) noexcept {
  return dequantize_dispatch(scales, codes, rows, dim, dtype, destination);
}
#endif

}  // namespace

bool all_finite(const std::uint8_t* source, std::size_t count, DType dtype) noexcept {
#ifdef KV_X86
  if (cpu_features().has_avx2) {
    return finite_avx2(source, count, dtype);
  }
#endif
  return finite_dispatch(source, count, dtype);
}

void quantize_rows(const std::uint8_t* source,
                   std::size_t rows,
                   std::size_t dim,
                   DType dtype,
                   std::uint8_t* scales,
                   std::uint8_t* codes) noexcept {
#ifdef KV_X86
  if (cpu_features().has_avx2) {
    quantize_avx2(source, rows, dim, dtype, scales, codes);
    return;
  }
#endif
  quantize_dispatch(source, rows, dim, dtype, scales, codes);
}

bool dequantize_rows(const std::uint8_t* scales,
                     const std::uint8_t* codes,
                     std::size_t rows,
                     std::size_t dim,
                     DType dtype,
                     std::uint8_t* destination) noexcept {
#ifdef KV_X86
  if (cpu_features().has_avx2) {
    return dequantize_avx2(scales, codes, rows, dim, dtype, destination);
  }
#endif
  return dequantize_dispatch(scales, codes, rows, dim, dtype, destination);
}

}  // namespace kv
