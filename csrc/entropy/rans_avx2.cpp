// SPDX-License-Identifier: Apache-2.0
// The coder with AVX2: eight states a vector, words spread over needing lanes by a table of
// permutations.
#include "entropy/rans_simd.hpp"

#ifdef KV_X86

#include <immintrin.h>

namespace kv {
namespace {

#define KV_AVX2_INLINE KV_TARGET_AVX2 inline __attribute__((always_inline))

constexpr std::size_t kVectors = kLanes / 8;

// For a mask of needing lanes, the word that each lane takes, a byte a lane.
constexpr std::array<std::uint64_t, 256> make_ranks() {
  std::array<std::uint64_t, 256> ranks{};
  for (std::size_t mask = 0; mask < 256; ++mask) {
    std::uint64_t rank = 0;
    for (unsigned lane = 0; lane < 8; ++lane) {
      ranks[mask] |= rank << (8 * lane);
      rank += mask >> lane & 1U;
    }
  }
  return ranks;
}

constexpr std::array<std::uint64_t, 256> kRanks = make_ranks();

// A quarter of a step: the entries of eight lanes. `next` moves by the words that were taken.
KV_AVX2_INLINE __m256i read_quarter(__m256i& states,
                                    const ReadEntry* table,
                                    const std::uint32_t* bases,
                                    const std::uint8_t*& next) noexcept {
  const __m256i slots = _mm256_and_si256(states, _mm256_set1_epi32(kProbabilityTotal - 1));
  const __m256i indices =
      _mm256_add_epi32(slots, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bases)));
  const __m256i entries = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), indices, 4);
  const __m256i frequency = _mm256_and_si256(entries, _mm256_set1_epi32(kFrequencyMask));
  const __m256i upper = _mm256_srli_epi32(states, kProbabilityBits);
  const __m256i moved = _mm256_add_epi32(_mm256_mullo_epi32(frequency, upper),
                                         _mm256_srli_epi32(entries, kBiasShift));
  // Below 2^16: the upper half is zero.
  const __m256i needs = _mm256_cmpeq_epi32(_mm256_srli_epi32(moved, 16), _mm256_setzero_si256());
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(needs)));
  const __m256i words =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(next)));
  next += 2 * static_cast<std::size_t>(_mm_popcnt_u32(mask));
  const __m256i ranks =
      _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kRanks[mask])));
  const __m256i spread = _mm256_permutevar8x32_epi32(words, ranks);
  states = _mm256_blendv_epi8(moved, _mm256_or_si256(_mm256_slli_epi32(moved, 16), spread), needs);
  return entries;
}

// One group of one segment: both steps, and its 64 symbols.
KV_AVX2_INLINE void read_group(__m256i* states,
                               const ReadEntry* table,
                               const std::uint32_t* bases,
                               const std::uint8_t*& next,
                               std::uint8_t* symbols) noexcept {
  __m256i pairs[kVectors];
  const __m256i first = _mm256_set1_epi32(0xFF);
  const __m256i both = _mm256_set1_epi32(0xFFFF);
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kVectors; ++i) {
    pairs[i] = read_quarter(states[i], table, bases + 8 * i, next);
  }
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kVectors; ++i) {
    const __m256i odd = read_quarter(states[i], table, bases + kLanes + 8 * i, next);
    // Symbols of a pair of channels lie side by side: bits 0-7 even, bits 8-15 odd.
    const __m256i low = _mm256_and_si256(_mm256_srli_epi32(pairs[i], kSymbolShift), first);
    const __m256i high = _mm256_srli_epi32(odd, kSymbolShift - 8);
    pairs[i] = _mm256_or_si256(low, _mm256_andnot_si256(first, _mm256_and_si256(high, both)));
  }
#pragma GCC unroll 2
  for (std::size_t i = 0; i < kVectors; i += 2) {
    // Packing works in halves of 128 bits: the quarters have to be put in order.
    const __m256i packed = _mm256_packus_epi32(pairs[i], pairs[i + 1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + 16 * i),
                        _mm256_permute4x64_epi64(packed, 0xD8));
  }
}

template <std::size_t kCount>
KV_TARGET_AVX2 void read_together(const ReadJob* jobs,
                                  std::size_t rows,
                                  std::size_t groups) noexcept {
  __m256i states[kCount][kVectors];
  std::uint8_t* symbols[kCount];
  for (std::size_t i = 0; i < kCount; ++i) {
    for (std::size_t vector = 0; vector < kVectors; ++vector) {
      states[i][vector] = _mm256_load_si256(
          reinterpret_cast<const __m256i*>(jobs[i].reader->states.data() + 8 * vector));
    }
    symbols[i] = jobs[i].symbols;
  }
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t group = 0; group < groups; ++group) {
#pragma GCC unroll 2
      for (std::size_t i = 0; i < kCount; ++i) {
        RansReader& reader = *jobs[i].reader;
        if (__builtin_expect(reader.next > reader.limit, 0)) {
          reader.refill();
        }
        const std::uint8_t* next = reader.next;
        read_group(states[i], jobs[i].table, jobs[i].bases + group * kGroup, next, symbols[i]);
        reader.next = next;
        symbols[i] += kGroup;
      }
    }
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    for (std::size_t vector = 0; vector < kVectors; ++vector) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(jobs[i].reader->states.data() + 8 * vector),
                         states[i][vector]);
    }
  }
}

}  // namespace

KV_TARGET_AVX2 void read_groups_avx2(const ReadJob* jobs,
                                     std::size_t num_jobs,
                                     std::size_t rows,
                                     std::size_t groups) noexcept {
  for (; num_jobs >= 2; num_jobs -= 2, jobs += 2) {
    read_together<2>(jobs, rows, groups);
  }
  if (num_jobs == 1) {
    read_together<1>(jobs, rows, groups);
  }
}

}  // namespace kv

#endif
