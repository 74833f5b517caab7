// SPDX-License-Identifier: Apache-2.0
// Scales of (head, token): how they are chosen and how they are stored (FORMAT.md sections 6.4 and
// 9).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "planes/plane.hpp"

namespace kv {

/// The scales of a plane's coded rows.
struct Scales {
  std::vector<std::int16_t> bases;    ///< [heads]
  std::vector<std::uint8_t> offsets;  ///< [heads, tokens]: scale minus base; signed if coded
  std::uint8_t scale_class = kStoredScales;

  [[nodiscard]] int code(std::size_t head, std::size_t row, std::size_t tokens) const noexcept {
    const std::uint8_t offset = offsets[head * tokens + row];
    return bases[head] + (scale_class == kStoredScales ? offset : static_cast<std::int8_t>(offset));
  }
};

/// Chooses them, as section 9 prescribes.
/// @param raw_rows  rows before the first coded one.
[[nodiscard]] Scales choose_scales(const PlaneShape& shape,
                                   const SourceRows& source,
                                   std::size_t raw_rows,
                                   int mult);

/// (log16(value) + 2) >> 2, or `otherwise` for a value that counts as zero.
[[nodiscard]] int log_rms_of(float mean_square, int otherwise) noexcept;

}  // namespace kv
