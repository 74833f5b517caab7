// SPDX-License-Identifier: Apache-2.0
// Bringing rows back: the same operations in the same order as the plain loop, so that all give the
// same bits.
#include "elements/bfloat16_rows.hpp"

#ifdef KV_X86

// GCC's own header passes vectors without a value where none is needed, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "elements/whole_lines.hpp"

namespace kv {
namespace {

#define KV_AVX2_INLINE KV_TARGET_AVX2 inline __attribute__((always_inline))
#define KV_AVX512_INLINE KV_TARGET_AVX512 inline __attribute__((always_inline))

struct Avx2 {
  using Floats = __m256;
  static constexpr std::size_t kLanes = 8;

  static KV_AVX2_INLINE Floats all(float value) noexcept { return _mm256_set1_ps(value); }
  static KV_AVX2_INLINE Floats load(const float* from) noexcept { return _mm256_loadu_ps(from); }
  static KV_AVX2_INLINE Floats load(const std::int8_t* from) noexcept {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static KV_AVX2_INLINE Floats load(const std::int16_t* from) noexcept {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static KV_AVX2_INLINE void keep(Floats values, float* to) noexcept {
    _mm256_storeu_ps(to, values);
  }
  static KV_AVX2_INLINE Floats sum(Floats a, Floats b) noexcept { return _mm256_add_ps(a, b); }
  static KV_AVX2_INLINE Floats product(Floats a, Floats b) noexcept { return _mm256_mul_ps(a, b); }
  static KV_AVX2_INLINE __m256i rounded(Floats values) noexcept {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i biased = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF));
    return _mm256_srli_epi32(_mm256_add_epi32(biased, odd), 16);
  }
  static KV_AVX2_INLINE void store(Floats low,
                                   Floats high,
                                   std::uint8_t* to,
                                   bool /*past_caches*/) noexcept {
    // Half a line at a time is what memory is slow at: always through the caches.
    // Packing works in halves of 128 bits: the quarters have to be put in order.
    const __m256i packed = _mm256_packus_epi32(rounded(low), rounded(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xD8));
  }
};

struct Avx512 {
  using Floats = __m512;
  static constexpr std::size_t kLanes = 16;

  static KV_AVX512_INLINE Floats all(float value) noexcept { return _mm512_set1_ps(value); }
  static KV_AVX512_INLINE Floats load(const float* from) noexcept { return _mm512_loadu_ps(from); }
  static KV_AVX512_INLINE Floats load(const std::int8_t* from) noexcept {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static KV_AVX512_INLINE Floats load(const std::int16_t* from) noexcept {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  static KV_AVX512_INLINE void keep(Floats values, float* to) noexcept {
    _mm512_storeu_ps(to, values);
  }
  static KV_AVX512_INLINE Floats sum(Floats a, Floats b) noexcept { return _mm512_add_ps(a, b); }
  static KV_AVX512_INLINE Floats product(Floats a, Floats b) noexcept {
    return _mm512_mul_ps(a, b);
  }
  static KV_AVX512_INLINE __m512i rounded(Floats values) noexcept {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  }
  static KV_AVX512_INLINE void store(Floats low,
                                     Floats high,
                                     std::uint8_t* to,
                                     bool past_caches) noexcept {
    alignas(64) static constexpr std::uint16_t kUpperHalves[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    store_line(
        to, _mm512_permutex2var_epi16(rounded(low), _mm512_load_si512(kUpperHalves), rounded(high)),
        past_caches);
  }
};

// All rows of two vectors of channels, then of the next two.
#define KV_RESTORE(NAME, VECTOR, TARGET)                                                 \
  template <bool kSteps, bool kMean, bool kDpcm, typename Quantised>                     \
  TARGET std::size_t NAME(const RestoreRows<Quantised>& given) noexcept {                \
    using V = VECTOR;                                                                    \
    const RowTransform& how = given.transform;                                           \
    const bool past_caches = fills_lines(given.target, given.target_stride);             \
    std::size_t first = 0;                                                               \
    for (; first + 2 * V::kLanes <= given.dim; first += 2 * V::kLanes) {                 \
      typename V::Floats steps[2];                                                       \
      typename V::Floats means[2];                                                       \
      typename V::Floats rhos[2];                                                        \
      typename V::Floats states[2];                                                      \
      for (std::size_t half = 0; half < 2; ++half) {                                     \
        const std::size_t channel = first + half * V::kLanes;                            \
        steps[half] = kSteps ? V::load(how.steps + channel) : V::all(how.step);          \
        means[half] = kMean ? V::load(how.mean + channel) : V::all(0.0F);                \
        rhos[half] = kDpcm ? V::load(how.rho + channel) : V::all(0.0F);                  \
        states[half] = kDpcm ? V::load(how.state + channel) : V::all(0.0F);              \
      }                                                                                  \
      const Quantised* quantised = given.quantised + first;                              \
      std::uint8_t* target = given.target + first * sizeof(std::uint16_t);               \
      for (std::size_t row = 0; row < given.rows; ++row) {                               \
        if (!kSteps && given.row_steps != nullptr) {                                     \
          steps[0] = steps[1] = V::all(given.row_steps[row]);                            \
        }                                                                                \
        typename V::Floats values[2];                                                    \
        for (std::size_t half = 0; half < 2; ++half) {                                   \
          values[half] = V::product(V::load(quantised + half * V::kLanes), steps[half]); \
          if (kDpcm) {                                                                   \
            values[half] = V::sum(values[half], V::product(rhos[half], states[half]));   \
            states[half] = values[half];                                                 \
          }                                                                              \
          if (kMean) {                                                                   \
            values[half] = V::sum(values[half], means[half]);                            \
          }                                                                              \
        }                                                                                \
        V::store(values[0], values[1], target, past_caches);                             \
        quantised += given.quantised_stride;                                             \
        target += given.target_stride;                                                   \
      }                                                                                  \
      for (std::size_t half = 0; kDpcm && half < 2; ++half) {                            \
        V::keep(states[half], how.state + first + half * V::kLanes);                     \
      }                                                                                  \
    }                                                                                    \
    return first;                                                                        \
  }

KV_RESTORE(restore_with_avx2, Avx2, KV_TARGET_AVX2)
KV_RESTORE(restore_with_avx512, Avx512, KV_TARGET_AVX512)
#undef KV_RESTORE

}  // namespace

#define KV_CHOOSE(NAME, RESTORE)                                                                \
  template <typename Quantised>                                                                 \
  std::size_t NAME(const RestoreRows<Quantised>& rows) noexcept {                               \
    const bool has_mean = rows.transform.mean != nullptr;                                       \
    if (rows.transform.steps == nullptr) {                                                      \
      return has_mean ? RESTORE<false, true, false>(rows) : RESTORE<false, false, false>(rows); \
    }                                                                                           \
    if (rows.transform.rho != nullptr) {                                                        \
      return has_mean ? RESTORE<true, true, true>(rows) : RESTORE<true, false, true>(rows);     \
    }                                                                                           \
    return has_mean ? RESTORE<true, true, false>(rows) : RESTORE<true, false, false>(rows);     \
  }                                                                                             \
  template std::size_t NAME(const RestoreRows<std::int8_t>&) noexcept;                          \
  template std::size_t NAME(const RestoreRows<std::int16_t>&) noexcept;

KV_CHOOSE(restore_bfloat16_avx2, restore_with_avx2)
KV_CHOOSE(restore_bfloat16_avx512, restore_with_avx512)
#undef KV_CHOOSE

}  // namespace kv

#pragma GCC diagnostic pop
#endif
