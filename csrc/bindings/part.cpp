// SPDX-License-Identifier: Apache-2.0
// Runs of layers in a directory.
#include "bindings/part.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "codec/groups.hpp"

namespace kv::bindings {

std::vector<EntryTuple> PlaneDirectory::entries() const {
  std::vector<EntryTuple> tuples;
  for (const PlaneEntry& entry : planes_) {
    tuples.emplace_back(entry.offset, entry.nbytes, entry.raw_nbytes,
                        static_cast<unsigned>(entry.coding), entry.crc32c, entry.transform,
                        entry.mult, entry.low_bits, entry.raw_rows, entry.scale_class,
                        entry.segment_heads);
  }
  return tuples;
}

std::tuple<std::uint64_t, std::uint64_t> PlaneDirectory::span(std::size_t first,
                                                              std::size_t end) const {
  check(first, end);
  const std::uint64_t start = planes_[2 * first_holder(planes_, first)].offset;
  const PlaneEntry& last = planes_[2 * end - 1];
  return {start, last.offset + last.padded_nbytes() - start};
}

bool PlaneDirectory::needs_calibration(std::size_t first, std::size_t end) const {
  check(first, end);
  return std::any_of(planes_.data() + 2 * first, planes_.data() + 2 * end, &is_calibrated);
}

PartArguments PlaneDirectory::part(std::size_t first,
                                   std::size_t end,
                                   pybind11::buffer data,
                                   std::uint64_t data_offset) const {
  check(first, end);
  const std::size_t held = first_holder(planes_, first);
  return PartArguments{RecordPart{2 * held,
                                  {planes_.data() + 2 * held, planes_.data() + 2 * end},
                                  segment_tokens_,
                                  ConstBytes(),
                                  data_offset,
                                  2 * (first - held)},
                       std::move(data)};
}

void PlaneDirectory::check(std::size_t first, std::size_t end) const {
  KV_EXPECT(first < end && end <= planes_.size() / 2, ShapeError,
            "layers " + std::to_string(first) + " to " + std::to_string(end) + " of " +
                std::to_string(planes_.size() / 2) + "; they must be consecutive, at least one");
}

}  // namespace kv::bindings
