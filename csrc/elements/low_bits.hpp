// SPDX-License-Identifier: Apache-2.0
// Low bits of quantised values, kept beside the entropy-coded symbols: for every bit of a row,
// ceil(dim / 8) bytes with a channel a bit (FORMAT.md section 6.4).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kv {

/// Bytes of one bit of a row.
[[nodiscard]] constexpr std::size_t low_row_nbytes(std::size_t dim) noexcept {
  return (dim + 7) / 8;
}

/// Packs one row.
/// @param lows    [dim], below 2^num_bits.
/// @param packed  num_bits x low_row_nbytes(dim) bytes.
void pack_low_bits(const std::uint8_t* lows,
                   std::size_t dim,
                   unsigned num_bits,
                   std::uint8_t* packed) noexcept;

/// Puts the low bits of one row below its symbols: symbol * 2^num_bits + low.
/// @param symbols  [dim].
/// @param widened  [dim].
void append_low_bits(const std::int8_t* symbols,
                     const std::uint8_t* packed,
                     std::size_t dim,
                     unsigned num_bits,
                     std::int16_t* widened) noexcept;

}  // namespace kv
