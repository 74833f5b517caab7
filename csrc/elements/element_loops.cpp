// SPDX-License-Identifier: Apache-2.0
// Plain loops without aliasing, compiled for the baseline, for AVX2 and for AVX-512: the compiler
// makes the vectors. Nothing may be fused (the build says -ffp-contract=off), so all agree.
#include "elements/element_loops.hpp"

#include <algorithm>
#include <array>

#include "core/cpu.hpp"
#include "elements/bfloat16_rows.hpp"
#include "elements/elements.hpp"

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

// Channels from `first` on.
template <typename Type, bool kSteps, bool kMean, bool kDpcm>
KV_INLINE bool quantise_rows(const QuantiseRows& given, std::size_t first) noexcept {
  using Bits = typename Type::Bits;
  const float* __restrict steps = given.transform.steps;
  const float* __restrict inverse_steps = given.transform.inverse_steps;
  const float* __restrict means = given.transform.mean;
  const float* __restrict rhos = given.transform.rho;
  const float* __restrict radii = given.largest;
  float* __restrict state = given.transform.state;
  const int shift = static_cast<int>(given.low_bits);
  const int low_mask = (1 << shift) - 1;
  const float span = static_cast<float>(1 << shift);
  const float spare = static_cast<float>(low_mask);
  const std::size_t dim = given.dim;
  unsigned any = 0;
  for (std::size_t row = 0; row < given.rows; ++row) {
    const std::uint8_t* __restrict source =
        given.source + static_cast<std::ptrdiff_t>(row) * given.source_stride;
    std::int8_t* __restrict symbols = given.symbols + row * given.symbols_stride;
    std::uint8_t* __restrict lows = given.lows + row * dim;
    std::uint8_t* __restrict flags = given.flags + row * dim;
    const bool has_own_step = given.row_steps != nullptr;
    const float step = has_own_step ? given.row_steps[row] : given.transform.step;
    const float inverse_step =
        has_own_step ? given.row_inverse_steps[row] : given.transform.inverse_step;
    // More arrays than a compiler would compare for overlaps.
#pragma GCC ivdep
    for (std::size_t i = first; i < dim; ++i) {
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
  }
  return any != 0;
}

// Channels from `first` on.
template <typename Type>
KV_INLINE bool quantise_any(const QuantiseRows& rows, std::size_t first) noexcept {
  const bool has_mean = rows.transform.mean != nullptr;
  if (rows.transform.steps == nullptr) {
    return has_mean ? quantise_rows<Type, false, true, false>(rows, first)
                    : quantise_rows<Type, false, false, false>(rows, first);
  }
  if (rows.transform.rho != nullptr) {
    return has_mean ? quantise_rows<Type, true, true, true>(rows, first)
                    : quantise_rows<Type, true, false, true>(rows, first);
  }
  return has_mean ? quantise_rows<Type, true, true, false>(rows, first)
                  : quantise_rows<Type, true, false, false>(rows, first);
}

template <typename Type, typename Quantised, bool kSteps, bool kMean, bool kDpcm>
KV_INLINE void restore_rows(const RestoreRows<Quantised>& given, std::size_t first) noexcept {
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
    for (std::size_t i = first; i < dim; ++i) {
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

// Channels from `first` on.
template <typename Type, typename Quantised>
KV_INLINE void restore_any(const RestoreRows<Quantised>& rows, std::size_t first) noexcept {
  const bool has_mean = rows.transform.mean != nullptr;
  if (rows.transform.steps == nullptr) {
    return has_mean ? restore_rows<Type, Quantised, false, true, false>(rows, first)
                    : restore_rows<Type, Quantised, false, false, false>(rows, first);
  }
  if (rows.transform.rho != nullptr) {
    return has_mean ? restore_rows<Type, Quantised, true, true, true>(rows, first)
                    : restore_rows<Type, Quantised, true, false, true>(rows, first);
  }
  return has_mean ? restore_rows<Type, Quantised, true, true, false>(rows, first)
                  : restore_rows<Type, Quantised, true, false, false>(rows, first);
}

// What a loop of its own has done: some channels of all rows.
template <typename Type>
struct NoVectors {
  static bool has_energy(std::size_t) noexcept { return false; }
  static float energy(const std::uint8_t*, std::size_t) noexcept { return 0.0F; }
  static QuantisedChannels quantise(const QuantiseRows&) noexcept { return {0, false}; }
  template <typename Quantised>
  static std::size_t restore(const RestoreRows<Quantised>&) noexcept {
    return 0;
  }
};

#ifdef KV_X86
template <typename Type>
struct Avx2Vectors : NoVectors<Type> {};
template <>
struct Avx2Vectors<BFloat16> : NoVectors<BFloat16> {
  template <typename Quantised>
  static std::size_t restore(const RestoreRows<Quantised>& rows) noexcept {
    return restore_bfloat16_avx2(rows);
  }
};

template <typename Type>
struct Avx512Vectors : NoVectors<Type> {};
template <>
struct Avx512Vectors<BFloat16> {
  static bool has_energy(std::size_t dim) noexcept { return dim % kPartials == 0; }
  static float energy(const std::uint8_t* source, std::size_t dim) noexcept {
    return energy_bfloat16_avx512(source, dim);
  }
  static QuantisedChannels quantise(const QuantiseRows& rows) noexcept {
    return quantise_bfloat16_avx512(rows);
  }
  template <typename Quantised>
  static std::size_t restore(const RestoreRows<Quantised>& rows) noexcept {
    return restore_bfloat16_avx512(rows);
  }
};
#endif

// One set of functions for a target of the compiler.
#define KV_ELEMENT_LOOPS(NAME, TARGET, VECTORS)                                                 \
  template <typename Type>                                                                      \
  struct NAME {                                                                                 \
    TARGET static void load(const std::uint8_t* source, std::size_t dim, float* out) noexcept { \
      load_any<Type>(source, dim, out);                                                         \
    }                                                                                           \
    TARGET static float energy(const std::uint8_t* source, std::size_t dim) noexcept {          \
      return VECTORS<Type>::has_energy(dim) ? VECTORS<Type>::energy(source, dim)                \
                                            : energy_any<Type>(source, dim);                    \
    }                                                                                           \
    TARGET static bool quantise(const QuantiseRows& rows) noexcept {                            \
      const QuantisedChannels done = VECTORS<Type>::quantise(rows);                             \
      const bool has_more = quantise_any<Type>(rows, done.count);                               \
      return done.has_exceptions || has_more;                                                   \
    }                                                                                           \
    TARGET static void restore8(const RestoreRows<std::int8_t>& rows) noexcept {                \
      restore_any<Type, std::int8_t>(rows, VECTORS<Type>::restore(rows));                       \
    }                                                                                           \
    TARGET static void restore16(const RestoreRows<std::int16_t>& rows) noexcept {              \
      restore_any<Type, std::int16_t>(rows, VECTORS<Type>::restore(rows));                      \
    }                                                                                           \
    static constexpr ElementLoops kLoops{&load, &energy, &quantise, &restore8, &restore16};     \
  };

KV_ELEMENT_LOOPS(BaselineLoops, , NoVectors)
#ifdef KV_X86
KV_ELEMENT_LOOPS(Avx2Loops, KV_TARGET_AVX2, Avx2Vectors)
KV_ELEMENT_LOOPS(Avx512Loops, KV_TARGET_AVX512, Avx512Vectors)
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
