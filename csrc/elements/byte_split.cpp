// SPDX-License-Identifier: Apache-2.0
// The rotate-and-split loops, compiled for the baseline, AVX2 and AVX-512.
#include "elements/byte_split.hpp"

#include "core/cpu.hpp"
#include "core/endian.hpp"
#include "elements/whole_lines.hpp"

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

KV_INLINE void merge_rows_any(MergeRows given) noexcept {
  for (std::size_t row = 0; row < given.rows; ++row) {
    merge_any(given.streams, given.count, given.itemsize, given.target);
    for (std::size_t stream = 0; stream < given.itemsize; ++stream) {
      given.streams[stream] += stream + 1 == given.itemsize ? given.high_stride : given.low_stride;
    }
    given.target += given.target_stride;
  }
}

#ifdef KV_X86
constexpr std::size_t kVector = 64;

// Bytes of two vectors side by side, for the first half of both.
constexpr std::array<std::uint8_t, kVector> make_pairs() {
  std::array<std::uint8_t, kVector> pairs{};
  for (std::size_t at = 0; at < kVector / 2; ++at) {
    pairs[2 * at] = static_cast<std::uint8_t>(at);
    pairs[2 * at + 1] = static_cast<std::uint8_t>(kVector + at);
  }
  return pairs;
}

alignas(kVector) constexpr std::array<std::uint8_t, kVector> kPairs = make_pairs();

// Elements of two bytes, whole vectors of them in every row.
KV_TARGET_AVX512 void merge_rows_of_vectors(const MergeRows& given) noexcept {
  const __m512i pairs = _mm512_load_si512(kPairs.data());
  const __m512i later = _mm512_add_epi8(pairs, _mm512_set1_epi8(kVector / 2));
  const std::uint8_t* low = given.streams[0];
  const std::uint8_t* high = given.streams[1];
  std::uint8_t* target = given.target;
  const bool past_caches = fills_lines(target, given.target_stride);
  for (std::size_t row = 0; row < given.rows; ++row) {
    for (std::size_t at = 0; at < given.count; at += kVector) {
      const __m512i lows = _mm512_loadu_si512(low + at);
      const __m512i highs = _mm512_loadu_si512(high + at);
      const __m512i first = _mm512_permutex2var_epi8(lows, pairs, highs);
      const __m512i second = _mm512_permutex2var_epi8(lows, later, highs);
      store_line(target + 2 * at, _mm512_shrdi_epi16(first, first, 1), past_caches);
      store_line(target + 2 * at + kVector, _mm512_shrdi_epi16(second, second, 1), past_caches);
    }
    low += given.low_stride;
    high += given.high_stride;
    target += given.target_stride;
  }
}
#endif

// The same loops for a target of the compiler.
#define KV_BYTE_LOOPS(NAME, TARGET)                                                      \
  struct NAME {                                                                          \
    TARGET static void split(const std::uint8_t* source,                                 \
                             std::size_t count,                                          \
                             std::size_t itemsize,                                       \
                             const Streams& streams) noexcept {                          \
      split_any(source, count, itemsize, streams);                                       \
    }                                                                                    \
    TARGET static void merge(const MergeRows& given) noexcept { merge_rows_any(given); } \
  };

KV_BYTE_LOOPS(BaselineLoops, )
#ifdef KV_X86
KV_BYTE_LOOPS(Avx2Loops, KV_TARGET_AVX2)
KV_BYTE_LOOPS(Avx512Loops, KV_TARGET_AVX512)
#endif
#undef KV_BYTE_LOOPS

}  // namespace

void split_bytes(const std::uint8_t* source,
                 std::size_t count,
                 std::size_t itemsize,
                 const Streams& streams) noexcept {
#ifdef KV_X86
  if (simd_level() == SimdLevel::kAvx512) {
    Avx512Loops::split(source, count, itemsize, streams);
    return;
  }
  if (simd_level() == SimdLevel::kAvx2) {
    Avx2Loops::split(source, count, itemsize, streams);
    return;
  }
#endif
  BaselineLoops::split(source, count, itemsize, streams);
}

void merge_rows(const MergeRows& given) noexcept {
#ifdef KV_X86
  if (simd_level() == SimdLevel::kAvx512) {
    if (given.itemsize == 2 && given.count % kVector == 0) {
      merge_rows_of_vectors(given);
    } else {
      Avx512Loops::merge(given);
    }
    return;
  }
  if (simd_level() == SimdLevel::kAvx2) {
    Avx2Loops::merge(given);
    return;
  }
#endif
  BaselineLoops::merge(given);
}

void merge_bytes(const ConstStreams& streams,
                 std::size_t count,
                 std::size_t itemsize,
                 std::uint8_t* destination) noexcept {
  merge_rows(MergeRows{streams, 0, 0, count, itemsize, 1, destination, 0});
}

}  // namespace kv
