// SPDX-License-Identifier: Apache-2.0
// The rotate-and-split loops, compiled for the baseline, AVX2 and AVX-512.
#include "planes/byte_split.hpp"

#include "core/cpu.hpp"
#include "core/endian.hpp"

namespace kv {
namespace {

// Plain loops without aliasing: the compiler turns each into packs and unpacks of the widest
// vectors allowed.

KV_INLINE void split16(const std::uint8_t* __restrict source,
                       std::size_t count,
                       std::uint8_t* __restrict low,
                       std::uint8_t* __restrict high) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    const auto element = load_le<std::uint16_t>(source + 2 * i);
    low[i] = static_cast<std::uint8_t>((element << 1) | (element >> 15));
    high[i] = static_cast<std::uint8_t>(element >> 7);
  }
}

KV_INLINE void merge16(const std::uint8_t* __restrict low,
                       const std::uint8_t* __restrict high,
                       std::size_t count,
                       std::uint8_t* __restrict destination) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    const auto rotated = static_cast<std::uint16_t>(low[i] | (high[i] << 8));
    const auto element = static_cast<std::uint16_t>((rotated >> 1) | (rotated << 15));
    store_le<std::uint16_t>(destination + 2 * i, element);
  }
}

KV_INLINE void split32(const std::uint8_t* __restrict source,
                       std::size_t count,
                       std::uint8_t* __restrict byte0,
                       std::uint8_t* __restrict byte1,
                       std::uint8_t* __restrict byte2,
                       std::uint8_t* __restrict byte3) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    const auto element = load_le<std::uint32_t>(source + 4 * i);
    byte0[i] = static_cast<std::uint8_t>((element << 1) | (element >> 31));
    byte1[i] = static_cast<std::uint8_t>(element >> 7);
    byte2[i] = static_cast<std::uint8_t>(element >> 15);
    byte3[i] = static_cast<std::uint8_t>(element >> 23);
  }
}

KV_INLINE void merge32(const std::uint8_t* __restrict byte0,
                       const std::uint8_t* __restrict byte1,
                       const std::uint8_t* __restrict byte2,
                       const std::uint8_t* __restrict byte3,
                       std::size_t count,
                       std::uint8_t* __restrict destination) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t rotated = std::uint32_t{byte0[i]} | std::uint32_t{byte1[i]} << 8 |
                                  std::uint32_t{byte2[i]} << 16 | std::uint32_t{byte3[i]} << 24;
    store_le<std::uint32_t>(destination + 4 * i, (rotated >> 1) | (rotated << 31));
  }
}

KV_INLINE void split_any(const std::uint8_t* source,
                         std::size_t count,
                         std::size_t itemsize,
                         const Streams& to) noexcept {
  if (itemsize == 2) {
    split16(source, count, to[0], to[1]);
  } else {
    split32(source, count, to[0], to[1], to[2], to[3]);
  }
}

KV_INLINE void merge_any(const ConstStreams& from,
                         std::size_t count,
                         std::size_t itemsize,
                         std::uint8_t* destination) noexcept {
  if (itemsize == 2) {
    merge16(from[0], from[1], count, destination);
  } else {
    merge32(from[0], from[1], from[2], from[3], count, destination);
  }
}

#ifdef KV_X86
KV_TARGET_AVX2 void split_avx2(const std::uint8_t* source,
                               std::size_t count,
                               std::size_t itemsize,
                               const Streams& streams) noexcept {
  split_any(source, count, itemsize, streams);
}

KV_TARGET_AVX2 void merge_avx2(const ConstStreams& streams,
                               std::size_t count,
                               std::size_t itemsize,
                               std::uint8_t* destination) noexcept {
  merge_any(streams, count, itemsize, destination);
}

KV_TARGET_AVX512 void split_avx512(const std::uint8_t* source,
                                   std::size_t count,
                                   std::size_t itemsize,
                                   const Streams& streams) noexcept {
  split_any(source, count, itemsize, streams);
}

KV_TARGET_AVX512 void merge_avx512(const ConstStreams& streams,
                                   std::size_t count,
                                   std::size_t itemsize,
                                   std::uint8_t* destination) noexcept {
  merge_any(streams, count, itemsize, destination);
}
#endif

}  // namespace

void split_bytes(const std::uint8_t* source,
                 std::size_t count,
                 std::size_t itemsize,
                 const Streams& streams) noexcept {
#ifdef KV_X86
  if (simd_level() == SimdLevel::kAvx512) {
    split_avx512(source, count, itemsize, streams);
    return;
  }
  if (simd_level() == SimdLevel::kAvx2) {
    split_avx2(source, count, itemsize, streams);
    return;
  }
#endif
  split_any(source, count, itemsize, streams);
}

void merge_bytes(const ConstStreams& streams,
                 std::size_t count,
                 std::size_t itemsize,
                 std::uint8_t* destination) noexcept {
#ifdef KV_X86
  if (simd_level() == SimdLevel::kAvx512) {
    merge_avx512(streams, count, itemsize, destination);
    return;
  }
  if (simd_level() == SimdLevel::kAvx2) {
    merge_avx2(streams, count, itemsize, destination);
    return;
  }
#endif
  merge_any(streams, count, itemsize, destination);
}

}  // namespace kv
