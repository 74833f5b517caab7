// SPDX-License-Identifier: Apache-2.0
// The coder with AVX-512: 16 states a vector, words spread over needing lanes by one expansion.
#include "entropy/rans_simd.hpp"

#ifdef KV_X86

// GCC's own header passes vectors without a value where none is needed, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "entropy/look_up.hpp"

namespace kv {
namespace {

#define KV_AVX512_INLINE KV_TARGET_AVX512 inline __attribute__((always_inline))

KV_AVX512_INLINE void find_places(__m512i low,
                                  __m512i high,
                                  const std::uint32_t* bases,
                                  Places& places) noexcept {
  constexpr int kSlotOrBase = 0xEA;  // (state & mask) | base
  const __m512i slot_mask = _mm512_set1_epi32(kProbabilityTotal - 1);
  _mm512_store_si512(places.at.data(), _mm512_ternarylogic_epi32(
                                           low, slot_mask, _mm512_loadu_si512(bases), kSlotOrBase));
  _mm512_store_si512(
      places.at.data() + 16,
      _mm512_ternarylogic_epi32(high, slot_mask, _mm512_loadu_si512(bases + 16), kSlotOrBase));
  keep_in_memory(places);
}

KV_AVX512_INLINE __m512i look_up_16(const ReadEntry* table, const std::uint32_t* places) noexcept {
  const __m256i low = _mm256_set_m128i(look_up_4(table, places + 4), look_up_4(table, places));
  const __m256i high =
      _mm256_set_m128i(look_up_4(table, places + 12), look_up_4(table, places + 8));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

KV_AVX512_INLINE __m512i load_words(const std::uint8_t* from) noexcept {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// One step of one segment: the entries of its 32 lanes. `next` moves by the words that were taken.
KV_AVX512_INLINE void read_step(__m512i& low,
                                __m512i& high,
                                const ReadEntry* table,
                                const Places& places,
                                const std::uint8_t*& next,
                                __m512i& low_entries,
                                __m512i& high_entries) noexcept {
  const __m512i frequency_mask = _mm512_set1_epi32(kFrequencyMask);
  const __m512i floor = _mm512_set1_epi32(kStateFloor);
  low_entries = look_up_16(table, places.at.data());
  high_entries = look_up_16(table, places.at.data() + 16);
  const __m512i low_moved =
      _mm512_add_epi32(_mm512_mullo_epi32(_mm512_and_si512(low_entries, frequency_mask),
                                          _mm512_srli_epi32(low, kProbabilityBits)),
                       _mm512_srli_epi32(low_entries, kBiasShift));
  const __m512i high_moved =
      _mm512_add_epi32(_mm512_mullo_epi32(_mm512_and_si512(high_entries, frequency_mask),
                                          _mm512_srli_epi32(high, kProbabilityBits)),
                       _mm512_srli_epi32(high_entries, kBiasShift));
  const __mmask16 low_needs = _mm512_cmplt_epu32_mask(low_moved, floor);
  const __mmask16 high_needs = _mm512_cmplt_epu32_mask(high_moved, floor);
  // Each needing lane takes the next word.
  const std::uint8_t* high_words = next + 2 * _mm_popcnt_u32(_cvtmask16_u32(low_needs));
  low = _mm512_or_si512(_mm512_mask_slli_epi32(low_moved, low_needs, low_moved, 16),
                        _mm512_maskz_expand_epi32(low_needs, load_words(next)));
  high = _mm512_or_si512(_mm512_mask_slli_epi32(high_moved, high_needs, high_moved, 16),
                         _mm512_maskz_expand_epi32(high_needs, load_words(high_words)));
  next = high_words + 2 * _mm_popcnt_u32(_cvtmask16_u32(high_needs));
}

// Symbols of a pair of channels lie side by side: bits 0-7 even, bits 8-15 odd.
KV_AVX512_INLINE void store_pairs(__m512i even, __m512i odd, std::uint8_t* symbols) noexcept {
  constexpr int kSelect = 0xCA;  // mask ? first : second
  const __m512i pairs =
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xFF), _mm512_srli_epi32(even, kSymbolShift),
                                _mm512_srli_epi32(odd, kSymbolShift - 8), kSelect);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm512_cvtepi32_epi16(pairs));
}

// kCount segments in lock step: one waits for its look-ups while the others work. Loops over them
// are not unrolled: that much code would not stay where CPUs keep decoded instructions.
template <std::size_t kCount>
KV_TARGET_AVX512 void read_together(const ReadJob* jobs,
                                    std::size_t rows,
                                    std::size_t groups) noexcept {
  __m512i low[kCount];
  __m512i high[kCount];
  const std::uint8_t* next[kCount];
  const std::uint8_t* limit[kCount];
  std::uint8_t* symbols[kCount];
  for (std::size_t i = 0; i < kCount; ++i) {
    low[i] = _mm512_load_si512(jobs[i].reader->states.data());
    high[i] = _mm512_load_si512(jobs[i].reader->states.data() + 16);
    next[i] = jobs[i].reader->next;
    limit[i] = jobs[i].reader->limit;
    symbols[i] = jobs[i].symbols;
  }
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t group = 0; group < groups; ++group) {
      __m512i even_low[kCount];
      __m512i even_high[kCount];
      Places places[kCount];
#pragma GCC unroll 1
      for (std::size_t i = 0; i < kCount; ++i) {
        if (__builtin_expect(next[i] > limit[i], 0)) {
          jobs[i].reader->next = next[i];
          jobs[i].reader->refill();
          next[i] = jobs[i].reader->next;
          limit[i] = jobs[i].reader->limit;
        }
      }
#pragma GCC unroll 1
      for (std::size_t i = 0; i < kCount; ++i) {
        find_places(low[i], high[i], jobs[i].bases + group * kGroup, places[i]);
      }
#pragma GCC unroll 1
      for (std::size_t i = 0; i < kCount; ++i) {
        read_step(low[i], high[i], jobs[i].table, places[i], next[i], even_low[i], even_high[i]);
        find_places(low[i], high[i], jobs[i].bases + group * kGroup + kLanes, places[i]);
      }
#pragma GCC unroll 1
      for (std::size_t i = 0; i < kCount; ++i) {
        __m512i odd_low;
        __m512i odd_high;
        read_step(low[i], high[i], jobs[i].table, places[i], next[i], odd_low, odd_high);
        store_pairs(even_low[i], odd_low, symbols[i]);
        store_pairs(even_high[i], odd_high, symbols[i] + 32);
        symbols[i] += kGroup;
      }
    }
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    _mm512_store_si512(jobs[i].reader->states.data(), low[i]);
    _mm512_store_si512(jobs[i].reader->states.data() + 16, high[i]);
    jobs[i].reader->next = next[i];
  }
}

// New states of 16 lanes, once their words are out.
KV_AVX512_INLINE __m512i push(__m512i states, __m512i frequency, __m512i start) noexcept {
  // states / frequency < 2^22: with a reciprocal of 23 bits, the quotient is off by one at most.
  const __m512 divisor = _mm512_cvtepi32_ps(frequency);
  const __m512 rough = _mm512_rcp14_ps(divisor);
  const __m512 inverse =
      _mm512_mul_ps(rough, _mm512_fnmadd_ps(divisor, rough, _mm512_set1_ps(2.0F)));
  const __m512i quotient = _mm512_cvttps_epu32(_mm512_mul_ps(_mm512_cvtepu32_ps(states), inverse));
  const __m512i rest = _mm512_sub_epi32(states, _mm512_mullo_epi32(quotient, frequency));
  // quotient << 10 | rest + start; one too many or too few moves both by fixed amounts.
  const __m512i made = _mm512_add_epi32(_mm512_slli_epi32(quotient, kProbabilityBits),
                                        _mm512_add_epi32(rest, start));
  const __m512i correction = _mm512_sub_epi32(_mm512_set1_epi32(kProbabilityTotal), frequency);
  const __mmask16 is_over = _mm512_movepi32_mask(rest);
  const __mmask16 is_under = _mm512_cmpge_epi32_mask(rest, frequency);
  const __m512i lowered = _mm512_mask_sub_epi32(made, is_over, made, correction);
  return _mm512_mask_add_epi32(lowered, is_under, lowered, correction);
}

// One step backwards: 32 lanes, words below `next`.
KV_AVX512_INLINE void write_step(__m512i& low,
                                 __m512i& high,
                                 __m512i low_entries,
                                 __m512i high_entries,
                                 std::uint8_t*& next) noexcept {
  const __m512i half = _mm512_set1_epi32(0xFFFF);
  const __m512i low_frequency = _mm512_and_si512(low_entries, half);
  const __m512i high_frequency = _mm512_and_si512(high_entries, half);
  // state >= f << 22, in 64 bits: state >> 22 >= f, which f = 1024 never is.
  const __mmask16 low_emits = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(low, 22), low_frequency);
  const __mmask16 high_emits = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(high, 22), high_frequency);
  const __mmask32 emits = _mm512_kunpackw(high_emits, low_emits);
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)),
                                           _mm512_cvtepi32_epi16(high), 1);
  const auto count = static_cast<unsigned>(_mm_popcnt_u32(emits));
  next -= 2 * count;
  // Only the words that are new: behind them lie those of the steps after.
  _mm512_mask_storeu_epi16(next, _bzhi_u32(~0U, count), _mm512_maskz_compress_epi16(emits, words));
  low = push(_mm512_mask_srli_epi32(low, low_emits, low, 16), low_frequency,
             _mm512_srli_epi32(low_entries, 16));
  high = push(_mm512_mask_srli_epi32(high, high_emits, high, 16), high_frequency,
              _mm512_srli_epi32(high_entries, 16));
}

// Where the entries of a group's symbols are, in the order of its steps: even entries, odd ones.
struct GroupPlaces {
  Places even;
  Places odd;
};

KV_AVX512_INLINE void find_places(const WriteJob& job,
                                  const std::uint8_t* symbols,
                                  const std::uint32_t* bases,
                                  GroupPlaces& places) noexcept {
  const __m512i mask = _mm512_set1_epi32(job.symbol_mask);
  for (std::size_t half = 0; half < 2; ++half) {
    // Pairs of channels as 16-bit numbers: even in the low byte, odd in the high one.
    const __m512i pairs = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols + 32 * half)));
    const std::uint32_t* even = bases + 16 * half;
    const std::uint32_t* odd = even + kLanes;
    _mm512_store_si512(places.even.at.data() + 16 * half,
                       _mm512_add_epi32(_mm512_and_si512(pairs, mask), _mm512_loadu_si512(even)));
    _mm512_store_si512(places.odd.at.data() + 16 * half,
                       _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(pairs, 8), mask),
                                        _mm512_loadu_si512(odd)));
  }
  keep_in_memory(places.even);
  keep_in_memory(places.odd);
}

}  // namespace

void read_groups_avx512(const ReadJob* jobs,
                        std::size_t num_jobs,
                        std::size_t rows,
                        std::size_t groups) noexcept {
  switch (num_jobs) {
    case 4:
      read_together<4>(jobs, rows, groups);
      break;
    case 3:
      read_together<3>(jobs, rows, groups);
      break;
    case 2:
      read_together<2>(jobs, rows, groups);
      break;
    default:
      read_together<1>(jobs, rows, groups);
      break;
  }
}

KV_TARGET_AVX512 std::uint8_t* write_groups_avx512(const WriteJob& job) noexcept {
  __m512i low = _mm512_load_si512(job.states);
  __m512i high = _mm512_load_si512(job.states + 16);
  std::uint8_t* next = job.next;
  const std::uint8_t* symbols = job.symbols + job.rows * job.groups * kGroup;
  for (std::size_t row = 0; row < job.rows; ++row) {
    for (std::size_t group = job.groups; group-- > 0;) {
      symbols -= kGroup;
      GroupPlaces places;
      find_places(job, symbols, job.bases + group * kGroup, places);
      for (const Places* step : {&places.odd, &places.even}) {
        write_step(low, high, look_up_16(job.table, step->at.data()),
                   look_up_16(job.table, step->at.data() + 16), next);
      }
    }
  }
  _mm512_store_si512(job.states, low);
  _mm512_store_si512(job.states + 16, high);
  return next;
}

}  // namespace kv

#pragma GCC diagnostic pop
#endif
