// SPDX-License-Identifier: Apache-2.0
// Walks through the sections, each of which must fit and all of which must fill the plane.
#include "planes/sections.hpp"

#include "core/endian.hpp"
#include "elements/low_bits.hpp"

namespace kv {

ExponentSections find_exponent_sections(std::size_t plane,
                                        const PlaneShape& shape,
                                        const PlaneEntry& entry,
                                        ConstBytes stored) {
  const SegmentGrid grid = shape.grid(0, entry.segment_heads);
  SectionWalk walk(plane, stored);
  ExponentSections found;
  const std::size_t num_tables = walk.take(kSectionAlignment).data()[0];
  KV_EXPECT(num_tables >= 1 && num_tables <= kMaxAdaptiveTables, CorruptRecord,
            plane_name(plane) + " states " + std::to_string(num_tables) + " tables");
  const std::size_t channels = grid.heads * grid.dim;
  found.chosen.resize(channels);
  if (num_tables > 1) {
    const ConstBytes packed = walk.take((channels + 1) / 2);
    for (std::size_t channel = 0; channel < channels; ++channel) {
      found.chosen[channel] =
          static_cast<std::uint8_t>(packed.data()[channel / 2] >> (channel % 2 * 4) & 0xFU);
      KV_EXPECT(found.chosen[channel] < num_tables, CorruptRecord,
                plane_name(plane) + " has a channel without a table");
    }
  }
  const std::size_t used = read_tables(walk.rest(), num_tables, found.tables);
  KV_EXPECT(used > 0, CorruptRecord, plane_name(plane) + " has a table that is not valid");
  static_cast<void>(walk.take(used));
  const std::uint8_t* words = walk.take(grid.size() * sizeof(std::uint32_t)).data();
  found.lows = walk.take(shape.elements() * (shape.itemsize() - 1)).data();
  found.segments.reserve(grid.size());
  for (std::size_t index = 0; index < grid.size(); ++index) {
    found.segments.push_back(
        walk.take(kStatesNbytes + std::uint64_t{2} * load_le<std::uint32_t>(words + 4 * index)));
  }
  walk.expect_end();
  return found;
}

QuantisedSections find_quantised_sections(std::size_t plane,
                                          const PlaneShape& shape,
                                          const PlaneEntry& entry,
                                          ConstBytes stored) {
  const SegmentGrid grid = shape.grid(entry.raw_rows, entry.segment_heads);
  const Transform transform = Transform::from(entry.transform);
  SectionWalk walk(plane, stored);
  QuantisedSections found;
  if (transform.is_inline()) {
    const ConstBytes bytes = walk.take(inline_parameters_nbytes(grid.heads, grid.dim));
    KV_EXPECT(
        read_parameters(bytes, grid.heads, grid.dim, transform.source, found.inline_parameters),
        CorruptRecord, plane_name(plane) + " has a parameter out of range");
  }
  if (transform.axis == StepAxis::kToken) {
    found.scale_bases = walk.take(2 * grid.heads).data();
    for (std::size_t head = 0; head < grid.heads; ++head) {
      const int base = load_le<std::int16_t>(found.scale_bases + 2 * head);
      KV_EXPECT(base >= -kMaxStepCode && base <= kMaxStepCode, CorruptRecord,
                plane_name(plane) + " has a scale out of range");
    }
    if (entry.scale_class == kStoredScales) {
      found.scales = walk.take(grid.heads * grid.tokens).data();
    }
  }
  const std::uint8_t* counts = walk.take(8 * grid.size()).data();
  found.raw = walk.take(std::uint64_t{grid.heads} * entry.raw_rows * shape.row_nbytes()).data();
  found.lows =
      walk.take(std::uint64_t{grid.heads} * grid.tokens * entry.low_bits * low_row_nbytes(grid.dim))
          .data();
  found.segments.reserve(grid.size());
  for (std::size_t index = 0; index < grid.size(); ++index) {
    const std::uint64_t words = std::uint64_t{2} * load_le<std::uint32_t>(counts + 8 * index);
    const std::uint64_t exceptions = load_le<std::uint32_t>(counts + 8 * index + 4);
    const ConstBytes bytes = walk.take(kStatesNbytes + words + exceptions * (2 + shape.itemsize()));
    const std::uint8_t* indices = bytes.data() + kStatesNbytes + words;
    found.segments.push_back(
        StoredSegment{bytes.sub(0, kStatesNbytes), bytes.sub(kStatesNbytes, words), indices,
                      indices + 2 * exceptions, static_cast<std::size_t>(exceptions)});
  }
  walk.expect_end();
  return found;
}

}  // namespace kv
