// SPDX-License-Identifier: Apache-2.0
// The frozen tables of FORMAT.md sections 4.4 and 7, and the tables that the coder looks up.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kv {

constexpr unsigned kProbabilityBits = 10;
constexpr std::uint32_t kProbabilityTotal = 1U << kProbabilityBits;
constexpr std::size_t kNumClasses = 16;
/// The class of null entries, behind the sixteen of the format.
constexpr std::size_t kNullClass = kNumClasses;

/// One slot: frequency in bits 0-10, symbol from bit 11, slot - start from bit 22. In memory only.
using ReadEntry = std::uint32_t;
constexpr unsigned kSymbolShift = 11;
constexpr unsigned kBiasShift = 22;
constexpr std::uint32_t kFrequencyMask = (1U << kSymbolShift) - 1;
/// Pages of 1024 entries, one page a class.
constexpr std::size_t kReadPage = kProbabilityTotal;

[[nodiscard]] constexpr ReadEntry read_entry(std::uint32_t symbol,
                                             std::uint32_t frequency,
                                             std::uint32_t bias) noexcept {
  return frequency | (symbol & 0xFFU) << kSymbolShift | bias << kBiasShift;
}

/// One symbol: `frequency:16 | start:16`, lowest bits first.
using WriteEntry = std::uint32_t;

[[nodiscard]] constexpr WriteEntry write_entry(std::uint32_t frequency,
                                               std::uint32_t start) noexcept {
  return frequency | (start << 16);
}

/// Pages of signed symbols are indexed by their lowest seven bits.
constexpr std::size_t kClassWritePage = 128;

struct ClassTables {
  alignas(64) std::array<ReadEntry, (kNumClasses + 1) * kReadPage> read;
  alignas(64) std::array<WriteEntry, (kNumClasses + 1) * kClassWritePage> write;
  std::array<std::uint8_t, kNumClasses> radius;
};

/// All classes, made on first use. Thread-safe.
[[nodiscard]] const ClassTables& class_tables() noexcept;

/// Steps and their exponents lie in [-kMaxStepCode, kMaxStepCode].
constexpr int kMaxStepCode = 800;

/// EXP2 of section 7.
extern const std::uint32_t* const exp2_bits;

/// 2^(code / 8), as section 7 rounds it. `code` is clamped to the range above.
[[nodiscard]] inline float step_of(int code) noexcept {
  const int clamped = std::min(std::max(code, -kMaxStepCode), kMaxStepCode);
  const std::uint32_t bits =
      exp2_bits[clamped & 7] + (static_cast<std::uint32_t>(clamped >> 3) << 23);
  float step;
  std::memcpy(&step, &bits, sizeof(step));
  return step;
}

/// What log16 answers for a value that counts as zero.
constexpr int kLogOfZero = -(1 << 20);

/// 16 log2(value) rounded (section 7); `value` is not negative and no NaN.
[[nodiscard]] int log16(float value) noexcept;

}  // namespace kv
