// SPDX-License-Identifier: Apache-2.0
// What fuzzers call: each function takes any bytes at all, and aborts when the codec breaks a
// promise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/cpu.hpp"
#include "core/span.hpp"

namespace kv::fuzz {

using Buffer = std::vector<std::uint8_t>;
using Target = void(ConstBytes);

/// Header and directory as they are: refused or accepted, never more.
Target probe;
/// A sample (see Sample) whose checksums are made right first: all levels and all windows give the
/// same elements, or the same kind of refusal.
Target decode;
/// Settings and elements: all levels make the same record, which decodes to the same elements.
Target round_trip;
/// A calibration object whose checksum is made right first.
Target calibration;

/// What the decode target takes: `u32 nbytes of the calibration | calibration | record`.
struct Sample {
  Buffer calibration;
  Buffer record;

  /// A length that is too large counts as 0.
  [[nodiscard]] static Sample from(ConstBytes data);
  /// Makes all checksums right, as far as the lengths before them make sense.
  void seal();
};

/// Makes the checksum of a calibration object right.
void seal_calibration(Buffer& object);

enum class Verdict { kDecoded, kCorrupt, kUnsupported, kTooLarge };

struct Outcome {
  Verdict verdict;
  Buffer slot;  ///< all planes without gaps; empty unless decoded

  [[nodiscard]] bool operator==(const Outcome& other) const {
    return verdict == other.verdict && slot == other.slot;
  }
};

/// Decodes a whole record in loops of `level`; a record of more than a mebibyte of elements is too
/// large.
[[nodiscard]] Outcome decode_at(const Sample& sample, SimdLevel level);

/// The target `decode`, and what all levels made of it.
Outcome decode_sealed(ConstBytes data);

/// Calls `run` with every level that this machine has, and leaves the highest one on.
void at_all_levels(const std::function<void(SimdLevel)>& run);

/// Ends the program with a message that names the promise.
void expect(bool is_kept, const char* promise);

}  // namespace kv::fuzz
