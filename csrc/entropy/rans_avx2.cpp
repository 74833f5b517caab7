// SPDX-License-Identifier: Apache-2.0
// The coder with AVX2: eight states a vector, words spread over needing lanes by a table of
// permutations.
#include "entropy/rans_simd.hpp"

#ifdef KV_X86

#include "entropy/look_up.hpp"

namespace kv {
namespace {

#define KV_AVX2_INLINE KV_TARGET_AVX2 inline __attribute__((always_inline))

constexpr std::size_t kVectors = kLanes / 8;

// For a mask of needing lanes, the word that each lane takes.
using Ranks = std::array<std::array<std::uint32_t, 8>, 256>;

constexpr Ranks make_ranks() {
  Ranks ranks{};
  for (std::size_t mask = 0; mask < 256; ++mask) {
    std::uint32_t rank = 0;
    for (unsigned lane = 0; lane < 8; ++lane) {
      ranks[mask][lane] = rank;
      rank += static_cast<std::uint32_t>(mask >> lane) & 1U;
    }
  }
  return ranks;
}

alignas(64) constexpr Ranks kRanks = make_ranks();

KV_AVX2_INLINE void find_places(const __m256i* states,
                                const std::uint32_t* bases,
                                Places& places) noexcept {
  for (std::size_t i = 0; i < kVectors; ++i) {
    const __m256i slots = _mm256_and_si256(states[i], _mm256_set1_epi32(kProbabilityTotal - 1));
    const __m256i pages = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bases + 8 * i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(places.at.data() + 8 * i),
                       _mm256_or_si256(slots, pages));
  }
  keep_in_memory(places);
}

// A quarter of a step: the entries of eight lanes. `next` moves by the words that were taken.
KV_AVX2_INLINE __m256i read_quarter(__m256i& states,
                                    const ReadEntry* table,
                                    const std::uint32_t* places,
                                    const std::uint8_t*& next) noexcept {
  const __m256i entries = _mm256_set_m128i(look_up_4(table, places + 4), look_up_4(table, places));
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
  const __m256i ranks = _mm256_load_si256(reinterpret_cast<const __m256i*>(kRanks[mask].data()));
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
  Places places;
  find_places(states, bases, places);
  const __m256i first = _mm256_set1_epi32(0xFF);
  const __m256i both = _mm256_set1_epi32(0xFFFF);
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kVectors; ++i) {
    pairs[i] = read_quarter(states[i], table, places.at.data() + 8 * i, next);
  }
  find_places(states, bases + kLanes, places);
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kVectors; ++i) {
    const __m256i odd = read_quarter(states[i], table, places.at.data() + 8 * i, next);
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
#pragma GCC unroll 1
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

// For a mask of emitting lanes, the bytes of their words, moved up to the end of eight.
using Orders = std::array<std::array<std::uint8_t, 16>, 256>;

constexpr Orders make_orders() {
  Orders orders{};
  for (std::size_t mask = 0; mask < 256; ++mask) {
    for (std::uint8_t& byte : orders[mask]) {
      byte = 0x80;
    }
    std::size_t at = 16;
    for (std::size_t lane = 8; lane-- > 0;) {
      if ((mask >> lane & 1U) != 0) {
        orders[mask][--at] = static_cast<std::uint8_t>(2 * lane + 1);
        orders[mask][--at] = static_cast<std::uint8_t>(2 * lane);
      }
    }
  }
  return orders;
}

alignas(64) constexpr Orders kOrders = make_orders();

// New states of eight lanes, once their words are out.
KV_AVX2_INLINE __m256i push(__m256i states, __m256i frequency, __m256i start) noexcept {
  const __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1.0F), _mm256_cvtepi32_ps(frequency));
  // States use all 32 bits, conversions 31.
  const __m256 rest_of_state =
      _mm256_cvtepi32_ps(_mm256_and_si256(states, _mm256_set1_epi32(0x7FFFFFFF)));
  const __m256 upper_half =
      _mm256_and_ps(_mm256_castsi256_ps(_mm256_srai_epi32(states, 31)), _mm256_set1_ps(0x1p31F));
  // states / frequency < 2^22: four roundings of 24 bits leave it off by one at most.
  const __m256i quotient =
      _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_add_ps(rest_of_state, upper_half), inverse));
  const __m256i rest = _mm256_sub_epi32(states, _mm256_mullo_epi32(quotient, frequency));
  const __m256i made = _mm256_add_epi32(_mm256_slli_epi32(quotient, kProbabilityBits),
                                        _mm256_add_epi32(rest, start));
  const __m256i correction = _mm256_sub_epi32(_mm256_set1_epi32(kProbabilityTotal), frequency);
  const __m256i is_over = _mm256_srai_epi32(rest, 31);
  const __m256i is_under =
      _mm256_cmpgt_epi32(rest, _mm256_sub_epi32(frequency, _mm256_set1_epi32(1)));
  const __m256i lowered = _mm256_sub_epi32(made, _mm256_and_si256(correction, is_over));
  return _mm256_add_epi32(lowered, _mm256_and_si256(correction, is_under));
}

// A quarter of a step backwards: eight lanes, words below `next`. What lies below them is garbage
// until the next words are written.
KV_AVX2_INLINE void write_quarter(__m256i& states,
                                  const WriteEntry* table,
                                  const std::uint32_t* places,
                                  std::uint8_t*& next) noexcept {
  const __m256i half = _mm256_set1_epi32(0xFFFF);
  const __m256i entries = _mm256_set_m128i(look_up_4(table, places + 4), look_up_4(table, places));
  const __m256i frequency = _mm256_and_si256(entries, half);
  // state >= f << 22, in 64 bits: state >> 22 >= f, which f = 1024 never is.
  const __m256i emits = _mm256_cmpgt_epi32(_mm256_srli_epi32(states, 22),
                                           _mm256_sub_epi32(frequency, _mm256_set1_epi32(1)));
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(emits)));
  const __m256i lowest = _mm256_and_si256(states, half);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1));
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kOrders[mask].data()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(next - 16), _mm_shuffle_epi8(words, order));
  next -= 2 * static_cast<std::size_t>(_mm_popcnt_u32(mask));
  const __m256i left = _mm256_blendv_epi8(states, _mm256_srli_epi32(states, 16), emits);
  states = push(left, frequency, _mm256_srli_epi32(entries, 16));
}

KV_AVX2_INLINE void find_places(const WriteJob& job,
                                const std::uint8_t* symbols,
                                const std::uint32_t* bases,
                                Places& even,
                                Places& odd) noexcept {
  const __m256i mask = _mm256_set1_epi32(job.symbol_mask);
  for (std::size_t i = 0; i < kVectors; ++i) {
    // Pairs of channels as 16-bit numbers: even in the low byte, odd in the high one.
    const __m256i pairs =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(symbols + 16 * i)));
    const auto* pages = reinterpret_cast<const __m256i*>(bases + 8 * i);
    _mm256_store_si256(reinterpret_cast<__m256i*>(even.at.data() + 8 * i),
                       _mm256_add_epi32(_mm256_and_si256(pairs, mask), _mm256_loadu_si256(pages)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(odd.at.data() + 8 * i),
                       _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(pairs, 8), mask),
                                        _mm256_loadu_si256(pages + kVectors)));
  }
  keep_in_memory(even);
  keep_in_memory(odd);
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

KV_TARGET_AVX2 std::uint8_t* write_groups_avx2(const WriteJob& job) noexcept {
  __m256i states[kVectors];
  for (std::size_t i = 0; i < kVectors; ++i) {
    states[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(job.states + 8 * i));
  }
  std::uint8_t* next = job.next;
  const std::uint8_t* symbols = job.symbols + job.rows * job.groups * kGroup;
  for (std::size_t row = 0; row < job.rows; ++row) {
    for (std::size_t group = job.groups; group-- > 0;) {
      symbols -= kGroup;
      Places even;
      Places odd;
      find_places(job, symbols, job.bases + group * kGroup, even, odd);
      for (const Places* step : {&odd, &even}) {
#pragma GCC unroll 4
        for (std::size_t i = kVectors; i-- > 0;) {
          write_quarter(states[i], job.table, step->at.data() + 8 * i, next);
        }
      }
    }
  }
  for (std::size_t i = 0; i < kVectors; ++i) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(job.states + 8 * i), states[i]);
  }
  return next;
}

}  // namespace kv

#endif
