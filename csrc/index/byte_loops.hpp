// SPDX-License-Identifier: Apache-2.0
// Inner products of a folded query with blocks of byte rows, for one CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kv {

/// A query whose weights hold the steps of the channels, as integers; padded to groups by zeros.
struct FoldedQuery {
  const std::int16_t* weights;  ///< [groups * 4]
  const std::int8_t* highs;     ///< [groups * 4]: weights == 128 * highs + lows
  const std::int8_t* lows;
  float unit;  ///< value of weight 1
  float bias;  ///< score of a row of codes 0
};

/// Scores of the rows of whole blocks: `scores[16 * blocks]` = bias + unit * (weights . codes).
using ByteLoop = void (*)(const std::uint8_t* codes,
                          std::size_t blocks,
                          std::size_t groups,
                          const FoldedQuery& query,
                          float* scores) noexcept;

/// The fastest loop that this machine offers; all give the same scores.
[[nodiscard]] ByteLoop byte_loop() noexcept;

}  // namespace kv
