// SPDX-License-Identifier: Apache-2.0
// Elements <-> one stream per byte position, after a rotation by one bit that makes the top byte
// the exponent (FORMAT.md section 3, coding 1).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kv {

/// Streams of 2-byte elements use the first two pointers, of 4-byte elements all four; index 0 is
/// the lowest byte.
using Streams = std::array<std::uint8_t*, 4>;
using ConstStreams = std::array<const std::uint8_t*, 4>;

/// Splits `count` elements of `itemsize` (2 or 4) bytes at `source`. 2 x count x itemsize bytes are
/// moved.
void split_bytes(const std::uint8_t* source,
                 std::size_t count,
                 std::size_t itemsize,
                 const Streams& streams) noexcept;

/// Inverse of split_bytes.
void merge_bytes(const ConstStreams& streams,
                 std::size_t count,
                 std::size_t itemsize,
                 std::uint8_t* destination) noexcept;

/// Rows of `count` elements to merge; strides are in bytes, from row to row.
struct MergeRows {
  ConstStreams streams;
  std::size_t low_stride;   ///< of all streams but the highest
  std::size_t high_stride;  ///< of the highest byte's
  std::size_t count;
  std::size_t itemsize;
  std::size_t rows;
  std::uint8_t* target;
  std::ptrdiff_t target_stride;
};

void merge_rows(const MergeRows& given) noexcept;

}  // namespace kv
