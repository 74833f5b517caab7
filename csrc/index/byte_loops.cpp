// SPDX-License-Identifier: Apache-2.0
// The inner loops over byte rows: plain, AVX2 and AVX-512 with VNNI.
#include "index/byte_loops.hpp"

#include <array>

#include "core/cpu.hpp"
#include "index/byte_rows.hpp"

#ifdef KV_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace kv {
namespace {

void score_plainly(const std::uint8_t* codes,
                   std::size_t blocks,
                   std::size_t groups,
                   const FoldedQuery& query,
                   float* scores) noexcept {
  for (std::size_t block = 0; block < blocks; ++block) {
    std::array<std::int32_t, kBlockRows> sums{};
    for (std::size_t group = 0; group < groups; ++group) {
      const std::int16_t* weights = query.weights + group * kGroupChannels;
      for (std::size_t row = 0; row < kBlockRows; ++row) {
        const std::uint8_t* code = codes + row * kGroupChannels;
        sums[row] += code[0] * weights[0] + code[1] * weights[1] + code[2] * weights[2] +
                     code[3] * weights[3];
      }
      codes += kBlockGroupNbytes;
    }
    for (std::size_t row = 0; row < kBlockRows; ++row) {
      *scores++ = query.bias + query.unit * static_cast<float>(sums[row]);
    }
  }
}

#ifdef KV_X86
// Four rows of four channels, as 16 bits.
KV_TARGET_AVX2 inline __m256i widened(const std::uint8_t* codes) noexcept {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// Pairs of sums of rows 0-3 and of rows 4-7 to the scores of rows 0-7.
KV_TARGET_AVX2 inline void store_scores(
    __m256i first, __m256i second, __m256 unit, __m256 bias, float* scores) noexcept {
  const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0b11011000);
  _mm256_storeu_ps(scores, _mm256_add_ps(bias, _mm256_mul_ps(unit, _mm256_cvtepi32_ps(sums))));
}

KV_TARGET_AVX2 void score_by_avx2(const std::uint8_t* codes,
                                  std::size_t blocks,
                                  std::size_t groups,
                                  const FoldedQuery& query,
                                  float* scores) noexcept {
  const __m256 unit = _mm256_set1_ps(query.unit);
  const __m256 bias = _mm256_set1_ps(query.bias);
  for (std::size_t block = 0; block < blocks; ++block) {
    __m256i sums0 = _mm256_setzero_si256();
    __m256i sums1 = sums0;
    __m256i sums2 = sums0;
    __m256i sums3 = sums0;
    for (std::size_t group = 0; group < groups; ++group) {
      const __m256i weights = _mm256_broadcastq_epi64(_mm_loadl_epi64(
          reinterpret_cast<const __m128i*>(query.weights + group * kGroupChannels)));
      sums0 = _mm256_add_epi32(sums0, _mm256_madd_epi16(widened(codes), weights));
      sums1 = _mm256_add_epi32(sums1, _mm256_madd_epi16(widened(codes + 16), weights));
      sums2 = _mm256_add_epi32(sums2, _mm256_madd_epi16(widened(codes + 32), weights));
      sums3 = _mm256_add_epi32(sums3, _mm256_madd_epi16(widened(codes + 48), weights));
      codes += kBlockGroupNbytes;
    }
    store_scores(sums0, sums1, unit, bias, scores);
    store_scores(sums2, sums3, unit, bias, scores + 8);
    scores += kBlockRows;
  }
}

// Sums with the high and the low halves of the weights, which VNNI takes as signed bytes.
struct Halves {
  __m512i high;
  __m512i low;
};

KV_TARGET_VNNI inline Halves added(const std::uint8_t* codes,
                                   const FoldedQuery& query,
                                   std::size_t group,
                                   Halves sums) noexcept {
  const __m512i code = _mm512_loadu_si512(codes);
  const auto word = [group](const std::int8_t* bytes) {
    return *reinterpret_cast<const std::int32_t __attribute__((may_alias))*>(
        bytes + group * kGroupChannels);
  };
  return {_mm512_dpbusd_epi32(sums.high, code, _mm512_set1_epi32(word(query.highs))),
          _mm512_dpbusd_epi32(sums.low, code, _mm512_set1_epi32(word(query.lows)))};
}

KV_TARGET_VNNI void score_by_vnni(const std::uint8_t* codes,
                                  std::size_t blocks,
                                  std::size_t groups,
                                  const FoldedQuery& query,
                                  float* scores) noexcept {
  const __m512 unit = _mm512_set1_ps(query.unit);
  const __m512 bias = _mm512_set1_ps(query.bias);
  for (std::size_t block = 0; block < blocks; ++block) {
    // Two pairs of sums, because one addition has to wait for the one before it.
    Halves even{_mm512_setzero_si512(), _mm512_setzero_si512()};
    Halves odd = even;
    std::size_t group = 0;
    for (; group + 2 <= groups; group += 2) {
      even = added(codes, query, group, even);
      odd = added(codes + kBlockGroupNbytes, query, group + 1, odd);
      codes += 2 * kBlockGroupNbytes;
    }
    if (group < groups) {
      even = added(codes, query, group, even);
      codes += kBlockGroupNbytes;
    }
    const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(even.high, odd.high), 7);
    const __m512i sums = _mm512_add_epi32(high, _mm512_add_epi32(even.low, odd.low));
    _mm512_storeu_ps(scores, _mm512_add_ps(bias, _mm512_mul_ps(unit, _mm512_cvtepi32_ps(sums))));
    scores += kBlockRows;
  }
}
#endif

}  // namespace

ByteLoop byte_loop() noexcept {
#ifdef KV_X86
  if (simd_level() >= SimdLevel::kAvx512 && cpu_features().has_vnni) {
    return score_by_vnni;
  }
  if (simd_level() >= SimdLevel::kAvx2) {
    return score_by_avx2;
  }
#endif
  return score_plainly;
}

}  // namespace kv
