// SPDX-License-Identifier: Apache-2.0
// Spreads the frozen frequencies into look-up tables.
#include "entropy/classes.hpp"

#include <algorithm>
#include <cstring>

namespace kv {
namespace {

#include "entropy/class_tables.inc"

ClassTables make_tables() noexcept {
  ClassTables tables{};
  std::copy(std::begin(kRadius), std::end(kRadius), tables.radius.begin());
  const std::uint16_t* half = kHalfFrequencies;
  for (std::size_t k = 0; k < kNumClasses; ++k) {
    const int radius = kRadius[k];
    ReadEntry* slots = tables.read.data() + k * kReadPage;
    WriteEntry* symbols = tables.write.data() + k * kClassWritePage;
    std::uint32_t start = 0;
    for (int symbol = -radius; symbol <= radius; ++symbol) {
      const std::uint32_t frequency = half[symbol < 0 ? -symbol : symbol];
      const auto bits = static_cast<std::uint32_t>(symbol);
      symbols[bits % kClassWritePage] = write_entry(frequency, start);
      for (std::uint32_t bias = 0; bias < frequency; ++bias) {
        slots[start + bias] = read_entry(bits, frequency, bias);
      }
      start += frequency;
    }
    half += radius + 1;
  }
  ReadEntry* null = tables.read.data() + kNullClass * kReadPage;
  for (std::uint32_t slot = 0; slot < kProbabilityTotal; ++slot) {
    null[slot] = read_entry(0, kProbabilityTotal, slot);
  }
  tables.write[kNullClass * kClassWritePage] = write_entry(kProbabilityTotal, 0);
  return tables;
}

// How many thresholds a fraction that begins with these four bits has passed at least.
constexpr std::array<std::uint8_t, 16> make_passed() {
  std::array<std::uint8_t, 16> passed{};
  for (std::uint32_t bucket = 0; bucket < 16; ++bucket) {
    for (const std::uint32_t threshold : kLog16) {
      passed[bucket] = static_cast<std::uint8_t>(passed[bucket] + (bucket << 19 >= threshold));
    }
  }
  return passed;
}

constexpr std::array<std::uint8_t, 16> kPassed = make_passed();

// Below 2^-120 a value counts as zero: denormals, and with them the flush-to-zero mode, play no
// part.
constexpr std::uint32_t kSmallestBits = (127U - 120U) << 23;

}  // namespace

const std::uint32_t* const exp2_bits = kExp2Bits;

const ClassTables& class_tables() noexcept {
  static const ClassTables tables = make_tables();
  return tables;
}

int log16(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (bits < kSmallestBits) {
    return kLogOfZero;
  }
  const std::uint32_t fraction = bits & 0x7FFFFFU;
  // Thresholds are further apart than half of a sixteenth: at most two lie within one.
  std::size_t passed = kPassed[fraction >> 19];
  passed += passed < 16 && fraction >= kLog16[passed] ? 1 : 0;
  passed += passed < 16 && fraction >= kLog16[passed] ? 1 : 0;
  return 16 * (static_cast<int>(bits >> 23) - 127) + static_cast<int>(passed);
}

}  // namespace kv
