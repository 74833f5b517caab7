// SPDX-License-Identifier: Apache-2.0
// Loops over tokens (forward) and over channels (inverse), compiled for the baseline, for AVX2 and
// for AVX-512. Nothing may be fused (the build says -ffp-contract=off), so all agree.
#include "basis/basis_loops.hpp"

#include <algorithm>
#include <cstring>

#include "core/cpu.hpp"
#include "elements/elements.hpp"

namespace kv {
namespace {

// Vectors of as many lanes as a target has; unlike arrays, they stay in registers. Sums are the
// same for any number of lanes: none is over lanes.
template <std::size_t kLanes>
struct Vectors;
template <>
struct Vectors<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Words = std::uint32_t __attribute__((vector_size(16)));
};
template <>
struct Vectors<8> {
  using Floats = float __attribute__((vector_size(32)));
  using Words = std::uint32_t __attribute__((vector_size(32)));
};
template <>
struct Vectors<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Words = std::uint32_t __attribute__((vector_size(64)));
};

constexpr std::size_t kSums = 4;

// Not by value: functions that return vectors differ between targets.
template <typename Vector>
KV_INLINE void load(const void* from, Vector& loaded) noexcept {
  std::memcpy(&loaded, from, sizeof(loaded));
}

template <std::size_t kWidth>
KV_INLINE void forward_any(const ForwardSums& given) noexcept {
  using Floats = typename Vectors<kWidth>::Floats;
  constexpr std::size_t kTokenVectors = kTokenTile / kWidth;
  for (std::size_t first = 0; first < given.rank; first += kSums) {
    const std::size_t count = std::min(kSums, given.rank - first);
    Floats sums[kSums][kTokenVectors] = {};
    for (std::size_t row = 0; row < given.rows; ++row) {
      const std::uint16_t* components = given.components + (row * given.rank + first) * given.dim;
      const float* weighted = given.weighted + row * given.dim * kTokenTile;
      // The last ones are summed twice rather than in a loop of another length.
      const std::uint16_t* at[kSums];
      for (std::size_t k = 0; k < kSums; ++k) {
        at[k] = components + std::min(k, count - 1) * given.dim;
      }
      for (std::size_t i = 0; i < given.dim; ++i) {
        for (std::size_t k = 0; k < kSums; ++k) {
          const float factor = BFloat16::load(at[k][i]);
          for (std::size_t v = 0; v < kTokenVectors; ++v) {
            Floats tokens;
            load(weighted + i * kTokenTile + v * kWidth, tokens);
            sums[k][v] += tokens * factor;
          }
        }
      }
    }
    for (std::size_t k = 0; k < count; ++k) {
      for (std::size_t v = 0; v < kTokenVectors; ++v) {
        const Floats sum = sums[k][v];
        std::memcpy(given.sums + (first + k) * kTokenTile + v * kWidth, &sum, sizeof(sum));
      }
    }
  }
}

// `kPairs` vectors of pairs of one row's channels: the even ones are the low halves of words.
template <std::size_t kPairs, std::size_t kWidth>
KV_INLINE void inverse_part(const InverseSums& given, std::size_t first) noexcept {
  using Floats = typename Vectors<kWidth>::Floats;
  using Words = typename Vectors<kWidth>::Words;
  Floats even[kPairs] = {};
  Floats odd[kPairs] = {};
  for (std::size_t k = 0; k < given.count; ++k) {
    const std::uint16_t* from = given.components + given.numbers[k] * given.dim + first;
    const float value = given.values[k];
    for (std::size_t v = 0; v < kPairs; ++v) {
      Words words;
      load(from + 2 * v * kWidth, words);
      const Words low = words << 16;
      const Words high = words & 0xFFFF0000U;
      Floats factors;
      load(&low, factors);
      even[v] += factors * value;
      load(&high, factors);
      odd[v] += factors * value;
    }
  }
  float* __restrict sums = given.sums + first;
  for (std::size_t v = 0; v < kPairs; ++v) {
    const Floats evens = even[v];
    const Floats odds = odd[v];
    float pairs[2][kWidth];
    std::memcpy(pairs[0], &evens, sizeof(evens));
    std::memcpy(pairs[1], &odds, sizeof(odds));
    for (std::size_t i = 0; i < kWidth; ++i) {
      sums[2 * (v * kWidth + i)] = pairs[0][i];
      sums[2 * (v * kWidth + i) + 1] = pairs[1][i];
    }
  }
}

template <std::size_t kWidth>
KV_INLINE void inverse_any(const InverseSums& given) noexcept {
  std::size_t at = 0;
  for (; at + 8 * kWidth <= given.dim; at += 8 * kWidth) {
    inverse_part<4, kWidth>(given, at);
  }
  for (; at + 4 * kWidth <= given.dim; at += 4 * kWidth) {
    inverse_part<2, kWidth>(given, at);
  }
  for (; at + 2 * kWidth <= given.dim; at += 2 * kWidth) {
    inverse_part<1, kWidth>(given, at);
  }
  for (; at < given.dim; ++at) {
    float sum = 0.0F;
    for (std::size_t k = 0; k < given.count; ++k) {
      sum += BFloat16::load(given.components[given.numbers[k] * given.dim + at]) * given.values[k];
    }
    given.sums[at] = sum;
  }
}

template <typename Type, bool kMean>
KV_INLINE bool weigh_row(const std::uint8_t* __restrict source,
                         const RowWeights& weights,
                         float* __restrict weighted) noexcept {
  using Bits = typename Type::Bits;
  const float* __restrict inverse_steps = weights.inverse_steps;
  const float* __restrict means = weights.means;
  unsigned any = 0;
#pragma GCC ivdep
  for (std::size_t i = 0; i < weights.dim; ++i) {
    const auto bits = load_le<Bits>(source + i * sizeof(Bits));
    any |= static_cast<unsigned>(static_cast<Bits>(bits & Type::kExponent) == Type::kExponent);
    const float value = Type::load(bits);
    weighted[i] = (kMean ? value - means[i] : value) * inverse_steps[i];
  }
  return any != 0;
}

template <typename Type, bool kMean>
KV_INLINE void restore_row(const float* __restrict sums,
                           const RowWeights& weights,
                           std::uint8_t* __restrict target) noexcept {
  using Bits = typename Type::Bits;
  const float* __restrict steps = weights.steps;
  const float* __restrict means = weights.means;
#pragma GCC ivdep
  for (std::size_t i = 0; i < weights.dim; ++i) {
    const float rebuilt = sums[i] * steps[i];
    store_le<Bits>(target + i * sizeof(Bits), Type::store(kMean ? rebuilt + means[i] : rebuilt));
  }
}

template <typename Type, bool kMean>
KV_INLINE bool compare_row(const float* __restrict sums,
                           const RowWeights& weights,
                           const std::uint8_t* __restrict source,
                           float* __restrict squares) noexcept {
  using Bits = typename Type::Bits;
  const float* __restrict steps = weights.steps;
  const float* __restrict inverse_steps = weights.inverse_steps;
  const float* __restrict means = weights.means;
  unsigned any = 0;
#pragma GCC ivdep
  for (std::size_t i = 0; i < weights.dim; ++i) {
    const float rebuilt = sums[i] * steps[i];
    const float made = kMean ? rebuilt + means[i] : rebuilt;
    any |= static_cast<unsigned>(static_cast<Bits>(Type::store(made) & Type::kExponent) ==
                                 Type::kExponent);
    const float off =
        (Type::load(load_le<Bits>(source + i * sizeof(Bits))) - made) * inverse_steps[i];
    squares[i] = off * off;
  }
  return any != 0;
}

// One set of functions for a target of the compiler.
#define KV_BASIS_LOOPS(NAME, TARGET, LANES)                                                       \
  template <typename Type>                                                                        \
  struct NAME {                                                                                   \
    TARGET static void forward(const ForwardSums& sums) noexcept { forward_any<LANES>(sums); }    \
    TARGET static void inverse(const InverseSums& sums) noexcept { inverse_any<LANES>(sums); }    \
    TARGET static bool weigh(const std::uint8_t* source,                                          \
                             const RowWeights& weights,                                           \
                             float* weighted) noexcept {                                          \
      return weights.means != nullptr ? weigh_row<Type, true>(source, weights, weighted)          \
                                      : weigh_row<Type, false>(source, weights, weighted);        \
    }                                                                                             \
    TARGET static void restore(const float* sums,                                                 \
                               const RowWeights& weights,                                         \
                               std::uint8_t* target) noexcept {                                   \
      weights.means != nullptr ? restore_row<Type, true>(sums, weights, target)                   \
                               : restore_row<Type, false>(sums, weights, target);                 \
    }                                                                                             \
    TARGET static bool compare(const float* sums,                                                 \
                               const RowWeights& weights,                                         \
                               const std::uint8_t* source,                                        \
                               float* squares) noexcept {                                         \
      return weights.means != nullptr ? compare_row<Type, true>(sums, weights, source, squares)   \
                                      : compare_row<Type, false>(sums, weights, source, squares); \
    }                                                                                             \
    static constexpr BasisLoops kLoops{&forward, &inverse, &weigh, &restore, &compare};           \
  };

KV_BASIS_LOOPS(BaselineLoops, , 4)
#ifdef KV_X86
KV_BASIS_LOOPS(Avx2Loops, KV_TARGET_AVX2, 8)
KV_BASIS_LOOPS(Avx512Loops, KV_TARGET_AVX512, 16)
#endif
#undef KV_BASIS_LOOPS

template <template <typename> class Loops>
const BasisLoops& loops_of(DType dtype) noexcept {
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

const BasisLoops& basis_loops(DType dtype) noexcept {
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

}  // namespace kv
