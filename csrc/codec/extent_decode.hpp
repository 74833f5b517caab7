// SPDX-License-Identifier: Apache-2.0
// Extents to slots: the header in front of a record (docs/file-format.md), then the record.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/calibration.hpp"
#include "codec/extent.hpp"
#include "core/geometry.hpp"
#include "core/span.hpp"
#include "planes/plane.hpp"

namespace kv {

/// What a catalogue says of the block in an extent.
struct ExpectedBlock {
  BlockKey key;
  std::uint64_t generation;
  std::uint64_t record_nbytes;
  std::uint64_t num_tokens;
};

/// What a decoder of whole blocks takes.
struct SlotCoding {
  Geometry geometry;
  DType dtype;
  bool has_lossy;                                ///< whether lossy records are answered with
  std::vector<const Calibration*> calibrations;  ///< of those that records name
};

/// Decodes the block of an extent into a slot, if the extent holds the expected block and nothing
/// stands against it: another block or geometry, damage, a coding or a calibration that is not at
/// hand. Why, the caller finds out; planes that fail their checksum leave the slot untouched.
///
/// @param extent  untrusted bytes, header first.
/// @param slot    coding.geometry.slot_nbytes() bytes.
/// @return whether the slot holds the block.
/// @throws Error likewise.
[[nodiscard]] bool decode_extent(const SlotCoding& coding,
                                 const ExpectedBlock& expected,
                                 ConstBytes extent,
                                 std::uint8_t* slot);

}  // namespace kv
