// SPDX-License-Identifier: Apache-2.0
// What reading a quantised plane looks up by channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "planes/parameters.hpp"
#include "planes/plane.hpp"

namespace kv {

/// Immutable; see lane_bases for the order of bases.
struct ChannelTables {
  std::vector<std::uint32_t> first_bases;  ///< of a segment's first token
  std::vector<std::uint32_t> rest_bases;   ///< of the others; empty where these are the same
  std::vector<float> steps;                ///< [heads, dim], axes but kToken
  // What they follow from, beside the parameters.
  std::uint8_t transform;
  std::int8_t mult;
  std::uint8_t low_bits;
};

/// Makes them, or takes those that were made last for the same calibrated parameters: every block
/// of a stream needs the same ones. Thread-safe.
/// @param parameters  null for ParameterSource::kNone.
[[nodiscard]] std::shared_ptr<const ChannelTables> channel_tables(
    const PlaneShape& shape, const PlaneEntry& entry, const PlaneParameters* parameters);

}  // namespace kv
