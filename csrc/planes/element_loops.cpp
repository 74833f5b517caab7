// SPDX-License-Identifier: Apache-2.0
// Plain loops without aliasing, compiled for the baseline, for AVX2 and for AVX-512: the compiler
// makes the vectors. Nothing may be fused (the build says -ffp-contract=off), so all agree.
#include "planes/element_loops.hpp"

#include <array>

#include "core/cpu.hpp"
#include "planes/elements.hpp"

namespace kv {
namespace {

constexpr std::size_t kPartials = 16;

KV_INLINE float fold(std::array<float, kPartials>& partials) noexcept {
  for (std::size_t half = kPartials / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) {
      partials[i] += partials[i + half];
    }
  }
  return partials[0];
}

template <typename Type>
KV_INLINE float load_finite(const std::uint8_t* source, std::size_t index) noexcept {
  using Bits = typename Type::Bits;
  const auto bits = load_le<Bits>(source + index * sizeof(Bits));
  return static_cast<Bits>(bits & Type::kExponent) == Type::kExponent ? 0.0F : Type::load(bits);
}

template <typename Type>
KV_INLINE void load_any(const std::uint8_t* __restrict source,
                        std::size_t dim,
                        float* __restrict values) noexcept {
  for (std::size_t i = 0; i < dim; ++i) {
    values[i] = load_finite<Type>(source, i);
  }
}

template <typename Type>
KV_INLINE float energy_any(const std::uint8_t* __restrict source, std::size_t dim) noexcept {
  std::array<float, kPartials> partials{};
  std::size_t at = 0;
  for (; at + kPartials <= dim; at += kPartials) {
    for (std::size_t i = 0; i < kPartials; ++i) {
      const float value = load_finite<Type>(source, at + i);
      partials[i] += value * value;
    }
  }
  for (std::size_t i = 0; at + i < dim; ++i) {
    const float value = load_finite<Type>(source, at + i);
    partials[i] += value * value;
  }
  return fold(partials);
}

template <typename Type, bool kSteps, bool kMean, bool kDpcm>
KV_INLINE bool quantise_row(const QuantiseRow& row) noexcept {
  using Bits = typename Type::Bits;
  const std::uint8_t* __restrict source = row.source;
  const float* __restrict steps = row.transform.steps;
  const float* __restrict inverse_steps = row.transform.inverse_steps;
  const float* __restrict means = row.transform.mean;
  const float* __restrict rhos = row.transform.rho;
  const float* __restrict radii = row.largest;
  float* __restrict state = row.transform.state;
  std::int8_t* __restrict symbols = row.symbols;
  std::uint8_t* __restrict lows = row.lows;
  std::uint8_t* __restrict flags = row.flags;
  const float step = row.transform.step;
  const float inverse_step = row.transform.inverse_step;
  const int shift = static_cast<int>(row.low_bits);
  const int low_mask = (1 << shift) - 1;
  const float span = static_cast<float>(1 << shift);
  const float spare = static_cast<float>(low_mask);
  const std::size_t dim = row.dim;
  unsigned any = 0;
  // More arrays than a compiler would compare for overlaps.
#pragma GCC ivdep
  for (std::size_t i = 0; i < dim; ++i) {
    const auto bits = load_le<Bits>(source + i * sizeof(Bits));
    const bool is_special = static_cast<Bits>(bits & Type::kExponent) == Type::kExponent;
    const float value = Type::load(bits);
    const float centred = kMean ? value - means[i] : value;
    const float predicted = kDpcm ? rhos[i] * state[i] : 0.0F;
    const float scaled = (centred - predicted) * (kSteps ? inverse_steps[i] : inverse_step);
    const float lowest = -(radii[i] * span);
    const float highest = radii[i] * span + spare;
    const float clamped = std::min(std::max(scaled, lowest - 1.0F), highest + 1.0F);
    // By mask, not by choice: what might trap on one side keeps compilers from making vectors.
    const float bounded =
        float_from(bits_of(clamped) & (static_cast<std::uint32_t>(is_special) - 1U));
    const float rounded = nearest(bounded);
    const float kept = std::min(std::max(rounded, lowest), highest);
    const float rebuilt = kept * (kSteps ? steps[i] : step) + predicted;
    if (kDpcm) {
      state[i] = rebuilt;
    }
    const Bits made = Type::store(kMean ? rebuilt + means[i] : rebuilt);
    const bool is_overflow = static_cast<Bits>(made & Type::kExponent) == Type::kExponent;
    const unsigned flag = static_cast<unsigned>(is_special) |
                          static_cast<unsigned>(rounded != kept) |
                          static_cast<unsigned>(is_overflow);
    const auto quantised = static_cast<std::int32_t>(kept);
    symbols[i] = static_cast<std::int8_t>(quantised >> shift);
    lows[i] = static_cast<std::uint8_t>(quantised & low_mask);
    flags[i] = static_cast<std::uint8_t>(flag);
    any |= flag;
  }
  return any != 0;
}

template <typename Type>
KV_INLINE bool quantise_any(const QuantiseRow& row) noexcept {
  const bool has_mean = row.transform.mean != nullptr;
  if (row.transform.steps == nullptr) {
    return has_mean ? quantise_row<Type, false, true, false>(row)
                    : quantise_row<Type, false, false, false>(row);
  }
  if (row.transform.rho != nullptr) {
    return has_mean ? quantise_row<Type, true, true, true>(row)
                    : quantise_row<Type, true, false, true>(row);
  }
  return has_mean ? quantise_row<Type, true, true, false>(row)
                  : quantise_row<Type, true, false, false>(row);
}

template <typename Type, typename Quantised, bool kSteps, bool kMean, bool kDpcm>
KV_INLINE void restore_rows(const RestoreRows<Quantised>& given) noexcept {
  using Bits = typename Type::Bits;
  const float* __restrict steps = given.transform.steps;
  const float* __restrict means = given.transform.mean;
  const float* __restrict rhos = given.transform.rho;
  float* __restrict state = given.transform.state;
  const std::size_t dim = given.dim;
  for (std::size_t row = 0; row < given.rows; ++row) {
    const Quantised* __restrict quantised = given.quantised + row * given.quantised_stride;
    std::uint8_t* __restrict target =
        given.target + static_cast<std::ptrdiff_t>(row) * given.target_stride;
    const float step = given.row_steps == nullptr ? given.transform.step : given.row_steps[row];
#pragma GCC ivdep
    for (std::size_t i = 0; i < dim; ++i) {
      const float predicted = kDpcm ? rhos[i] * state[i] : 0.0F;
      const float rebuilt =
          static_cast<float>(quantised[i]) * (kSteps ? steps[i] : step) + predicted;
      if (kDpcm) {
        state[i] = rebuilt;
      }
      const Bits made = Type::store(kMean ? rebuilt + means[i] : rebuilt);
      store_le<Bits>(target + i * sizeof(Bits), made);
    }
  }
}

template <typename Type, typename Quantised>
KV_INLINE void restore_any(const RestoreRows<Quantised>& rows) noexcept {
  const bool has_mean = rows.transform.mean != nullptr;
  if (rows.transform.steps == nullptr) {
    return has_mean ? restore_rows<Type, Quantised, false, true, false>(rows)
                    : restore_rows<Type, Quantised, false, false, false>(rows);
  }
  if (rows.transform.rho != nullptr) {
    return has_mean ? restore_rows<Type, Quantised, true, true, true>(rows)
                    : restore_rows<Type, Quantised, true, false, true>(rows);
  }
  return has_mean ? restore_rows<Type, Quantised, true, true, false>(rows)
                  : restore_rows<Type, Quantised, true, false, false>(rows);
}

// One set of functions for a target of the compiler.
#define KV_ELEMENT_LOOPS(NAME, TARGET)                                                          \
  template <typename Type>                                                                      \
  struct NAME {                                                                                 \
    TARGET static void load(const std::uint8_t* source, std::size_t dim, float* out) noexcept { \
      load_any<Type>(source, dim, out);                                                         \
    }                                                                                           \
    TARGET static float energy(const std::uint8_t* source, std::size_t dim) noexcept {          \
      return energy_any<Type>(source, dim);                                                     \
    }                                                                                           \
    TARGET static bool quantise(const QuantiseRow& row) noexcept {                              \
      return quantise_any<Type>(row);                                                           \
    }                                                                                           \
    TARGET static void restore8(const RestoreRows<std::int8_t>& rows) noexcept {                \
      restore_any<Type, std::int8_t>(rows);                                                     \
    }                                                                                           \
    TARGET static void restore16(const RestoreRows<std::int16_t>& rows) noexcept {              \
      restore_any<Type, std::int16_t>(rows);                                                    \
    }                                                                                           \
    static constexpr ElementLoops kLoops{&load, &energy, &quantise, &restore8, &restore16};     \
  };

KV_ELEMENT_LOOPS(BaselineLoops, )
#ifdef KV_X86
KV_ELEMENT_LOOPS(Avx2Loops, KV_TARGET_AVX2)
KV_ELEMENT_LOOPS(Avx512Loops, KV_TARGET_AVX512)
#endif
#undef KV_ELEMENT_LOOPS

template <template <typename> class Loops>
const ElementLoops& loops_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kBFloat16:
      return Loops<BFloat16>::kLoops;
    case DType::kFloat16:
      return Loops<Float16>::kLoops;
    case DType::kFloat32:
      break;
  }
  return Loops<Float32>::kLoops;
}

}  // namespace

const ElementLoops& element_loops(DType dtype) noexcept {
#ifdef KV_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return loops_of<Avx512Loops>(dtype);
    case SimdLevel::kAvx2:
      return loops_of<Avx2Loops>(dtype);
    case SimdLevel::kBaseline:
      break;
  }
#endif
  return loops_of<BaselineLoops>(dtype);
}

float sum16(const float* values, std::size_t count) noexcept {
  std::array<float, kPartials> partials{};
  for (std::size_t i = 0; i < count; ++i) {
    partials[i % kPartials] += values[i];
  }
  return fold(partials);
}

}  // namespace kv
