// SPDX-License-Identifier: Apache-2.0
// Eight channels at a time by a table and a multiplication; 64 with AVX-512, whose masks are the
// packed bits.
#include "elements/low_bits.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/cpu.hpp"
#include "core/endian.hpp"

#ifdef KV_X86
// GCC's own header passes vectors without a value where none is needed, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

namespace kv {
namespace {

constexpr std::size_t kTogether = 64;

// Byte i of kSpread[b] is bit i of b.
constexpr std::array<std::uint64_t, 256> make_spread() {
  std::array<std::uint64_t, 256> spread{};
  for (std::size_t byte = 0; byte < 256; ++byte) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      spread[byte] |= std::uint64_t{byte >> bit & 1U} << (8 * bit);
    }
  }
  return spread;
}

constexpr std::array<std::uint64_t, 256> kSpread = make_spread();

#ifdef KV_X86
KV_TARGET_AVX512 void pack_avx512(const std::uint8_t* lows,
                                  std::size_t dim,
                                  unsigned num_bits,
                                  std::uint8_t* packed) noexcept {
  for (std::size_t first = 0; first < dim; first += kTogether) {
    const __m512i bytes = _mm512_loadu_si512(lows + first);
    for (unsigned bit = 0; bit < num_bits; ++bit) {
      const __m512i one = _mm512_set1_epi8(static_cast<char>(1U << bit));
      store_le<std::uint64_t>(packed + bit * low_row_nbytes(dim) + first / 8,
                              _mm512_test_epi8_mask(bytes, one));
    }
  }
}

KV_TARGET_AVX512 void append_avx512(const std::int8_t* symbols,
                                    const std::uint8_t* packed,
                                    std::size_t dim,
                                    unsigned num_bits,
                                    std::int16_t* widened) noexcept {
  const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(num_bits));
  for (std::size_t first = 0; first < dim; first += kTogether) {
    __m512i lows = _mm512_setzero_si512();
    for (unsigned bit = 0; bit < num_bits; ++bit) {
      const auto mask = load_le<std::uint64_t>(packed + bit * low_row_nbytes(dim) + first / 8);
      lows = _mm512_or_si512(lows, _mm512_maskz_set1_epi8(mask, static_cast<char>(1U << bit)));
    }
    const __m512i bytes = _mm512_loadu_si512(symbols + first);
    const __m512i front = _mm512_or_si512(
        _mm512_sll_epi16(_mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)), shift),
        _mm512_cvtepu8_epi16(_mm512_castsi512_si256(lows)));
    const __m512i back = _mm512_or_si512(
        _mm512_sll_epi16(_mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1)), shift),
        _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(lows, 1)));
    _mm512_storeu_si512(widened + first, front);
    _mm512_storeu_si512(widened + first + kTogether / 2, back);
  }
}
#endif

}  // namespace

void pack_low_bits(const std::uint8_t* lows,
                   std::size_t dim,
                   unsigned num_bits,
                   std::uint8_t* packed) noexcept {
#ifdef KV_X86
  if (simd_level() == SimdLevel::kAvx512 && dim % kTogether == 0) {
    pack_avx512(lows, dim, num_bits, packed);
    return;
  }
#endif
  for (unsigned bit = 0; bit < num_bits; ++bit) {
    for (std::size_t first = 0; first < dim; first += 8) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, lows + first, std::min<std::size_t>(8, dim - first));
      // Gathers the lowest bits of eight bytes, the first one lowest.
      const std::uint64_t lowest = eight >> bit & 0x0101010101010101U;
      *packed++ = static_cast<std::uint8_t>(lowest * 0x0102040810204080U >> 56);
    }
  }
}

void append_low_bits(const std::int8_t* symbols,
                     const std::uint8_t* packed,
                     std::size_t dim,
                     unsigned num_bits,
                     std::int16_t* widened) noexcept {
#ifdef KV_X86
  if (simd_level() == SimdLevel::kAvx512 && dim % kTogether == 0) {
    append_avx512(symbols, packed, dim, num_bits, widened);
    return;
  }
#endif
  const int scale = 1 << num_bits;
  std::array<std::uint8_t, kTogether> lows;
  for (std::size_t first = 0; first < dim; first += kTogether) {
    const std::size_t count = std::min(kTogether, dim - first);
    for (std::size_t at = 0; at < count; at += 8) {
      std::uint64_t eight = 0;
      for (unsigned bit = 0; bit < num_bits; ++bit) {
        eight |= kSpread[packed[bit * low_row_nbytes(dim) + (first + at) / 8]] << bit;
      }
      store_le<std::uint64_t>(lows.data() + at, eight);
    }
    for (std::size_t i = 0; i < count; ++i) {
      widened[first + i] = static_cast<std::int16_t>(symbols[first + i] * scale + lows[i]);
    }
  }
}

}  // namespace kv

#ifdef KV_X86
#pragma GCC diagnostic pop
#endif
