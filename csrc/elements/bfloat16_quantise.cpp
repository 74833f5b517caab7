// SPDX-License-Identifier: Apache-2.0
// Measuring and quantising rows: the same operations in the same order as the plain loop, so that
// all give the same bits.
#include "elements/bfloat16_rows.hpp"

#ifdef KV_X86

// GCC's own header passes vectors without a value where none is needed, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

namespace kv {
namespace {

#define KV_AVX512_INLINE KV_TARGET_AVX512 inline __attribute__((always_inline))

constexpr std::size_t kVector = 16;

// What quantising 16 channels takes and keeps from row to row.
struct Channels {
  __m512 step;
  __m512 inverse_step;
  __m512 mean;
  __m512 rho;
  __m512 state;
  __m512 lowest;
  __m512 highest;
};

KV_AVX512_INLINE __mmask16 is_above(__m512 values, std::uint32_t largest_bits) noexcept {
  const __m512i magnitudes =
      _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_cmpgt_epi32_mask(magnitudes, _mm512_set1_epi32(static_cast<int>(largest_bits)));
}

KV_AVX512_INLINE __m512 load_16(const std::uint8_t* source) noexcept {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))), 16));
}

constexpr std::uint32_t kLargestFinite = 0x7F7FFFFF;

// The quantised values of 16 elements; `flags` gets the exceptions.
template <bool kMean, bool kDpcm>
KV_AVX512_INLINE __m512i quantise_16(const std::uint8_t* source,
                                     Channels& at,
                                     __mmask16& flags) noexcept {
  // The largest binary32 that is rounded to a finite bfloat16.
  constexpr std::uint32_t kLargestRounded = 0x7F7F7FFF;
  const __m512 one = _mm512_set1_ps(1.0F);
  const __m512 shift = _mm512_set1_ps(0x1.8p23F);
  const __m512 value = load_16(source);
  const __mmask16 is_special = is_above(value, kLargestFinite);
  __m512 difference = kMean ? _mm512_sub_ps(value, at.mean) : value;
  const __m512 predicted = _mm512_mul_ps(at.rho, at.state);
  if (kDpcm) {
    difference = _mm512_sub_ps(difference, predicted);
  }
  const __m512 scaled = _mm512_mul_ps(difference, at.inverse_step);
  const __m512 clamped = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_sub_ps(at.lowest, one)),
                                       _mm512_add_ps(at.highest, one));
  const __m512 bounded = _mm512_maskz_mov_ps(_knot_mask16(is_special), clamped);
  const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(bounded, shift), shift);
  const __m512 kept = _mm512_min_ps(_mm512_max_ps(rounded, at.lowest), at.highest);
  __m512 rebuilt = _mm512_mul_ps(kept, at.step);
  if (kDpcm) {
    rebuilt = _mm512_add_ps(rebuilt, predicted);
    at.state = rebuilt;
  }
  const __m512 made = kMean ? _mm512_add_ps(rebuilt, at.mean) : rebuilt;
  flags = static_cast<__mmask16>(is_special | is_above(made, kLargestRounded) |
                                 _mm512_cmp_ps_mask(rounded, kept, _CMP_NEQ_UQ));
  return _mm512_cvtps_epi32(kept);
}

// All rows of 32 channels, then of the next 32.
template <bool kSteps, bool kMean, bool kDpcm>
KV_TARGET_AVX512 QuantisedChannels quantise_with_avx512(const QuantiseRows& given) noexcept {
  const RowTransform& how = given.transform;
  const int low_bits = static_cast<int>(given.low_bits);
  const __m128i shift = _mm_cvtsi32_si128(low_bits);
  const __m512 span = _mm512_set1_ps(static_cast<float>(1 << low_bits));
  const __m512 spare = _mm512_set1_ps(static_cast<float>((1 << low_bits) - 1));
  const __m512i low_mask = _mm512_set1_epi32((1 << low_bits) - 1);
  QuantisedChannels done{0, false};
  for (; done.count + 2 * kVector <= given.dim; done.count += 2 * kVector) {
    Channels halves[2];
    for (std::size_t half = 0; half < 2; ++half) {
      const std::size_t channel = done.count + half * kVector;
      Channels& at = halves[half];
      at.step = kSteps ? _mm512_loadu_ps(how.steps + channel) : _mm512_set1_ps(how.step);
      at.inverse_step =
          kSteps ? _mm512_loadu_ps(how.inverse_steps + channel) : _mm512_set1_ps(how.inverse_step);
      at.mean = kMean ? _mm512_loadu_ps(how.mean + channel) : _mm512_setzero_ps();
      at.rho = kDpcm ? _mm512_loadu_ps(how.rho + channel) : _mm512_setzero_ps();
      at.state = kDpcm ? _mm512_loadu_ps(how.state + channel) : _mm512_setzero_ps();
      const __m512 reach = _mm512_mul_ps(_mm512_loadu_ps(given.largest + channel), span);
      at.lowest = _mm512_sub_ps(_mm512_setzero_ps(), reach);
      at.highest = _mm512_add_ps(reach, spare);
    }
    const std::uint8_t* source = given.source + done.count * sizeof(std::uint16_t);
    std::int8_t* symbols = given.symbols + done.count;
    std::size_t at_row = done.count;
    for (std::size_t row = 0; row < given.rows; ++row) {
      if (!kSteps && given.row_steps != nullptr) {
        halves[0].step = halves[1].step = _mm512_set1_ps(given.row_steps[row]);
        halves[0].inverse_step = halves[1].inverse_step =
            _mm512_set1_ps(given.row_inverse_steps[row]);
      }
      __mmask16 flags[2];
      for (std::size_t half = 0; half < 2; ++half) {
        const __m512i quantised = quantise_16<kMean, kDpcm>(
            source + half * kVector * sizeof(std::uint16_t), halves[half], flags[half]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols + half * kVector),
                         _mm512_cvtepi32_epi8(_mm512_sra_epi32(quantised, shift)));
        if (low_bits != 0) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(given.lows + at_row + half * kVector),
                           _mm512_cvtepi32_epi8(_mm512_and_si512(quantised, low_mask)));
        }
      }
      const __mmask32 both = _mm512_kunpackw(flags[1], flags[0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(given.flags + at_row),
                          _mm256_maskz_set1_epi8(both, 1));
      done.has_exceptions = done.has_exceptions || both != 0;
      source += given.source_stride;
      symbols += given.symbols_stride;
      at_row += given.dim;
    }
    for (std::size_t half = 0; kDpcm && half < 2; ++half) {
      _mm512_storeu_ps(how.state + done.count + half * kVector, halves[half].state);
    }
  }
  return done;
}

}  // namespace

KV_TARGET_AVX512 float energy_bfloat16_avx512(const std::uint8_t* source,
                                              std::size_t dim) noexcept {
  __m512 sums = _mm512_setzero_ps();
  for (std::size_t at = 0; at < dim; at += kVector) {
    const __m512 values = load_16(source + at * sizeof(std::uint16_t));
    const __m512 finite =
        _mm512_maskz_mov_ps(_knot_mask16(is_above(values, kLargestFinite)), values);
    sums = _mm512_add_ps(sums, _mm512_mul_ps(finite, finite));
  }
  // As sum16 of FORMAT.md section 9 folds them.
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

QuantisedChannels quantise_bfloat16_avx512(const QuantiseRows& rows) noexcept {
  const bool has_mean = rows.transform.mean != nullptr;
  if (rows.transform.steps == nullptr) {
    return has_mean ? quantise_with_avx512<false, true, false>(rows)
                    : quantise_with_avx512<false, false, false>(rows);
  }
  if (rows.transform.rho != nullptr) {
    return has_mean ? quantise_with_avx512<true, true, true>(rows)
                    : quantise_with_avx512<true, false, true>(rows);
  }
  return has_mean ? quantise_with_avx512<true, true, false>(rows)
                  : quantise_with_avx512<true, false, false>(rows);
}

}  // namespace kv

#pragma GCC diagnostic pop
#endif
