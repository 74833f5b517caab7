// SPDX-License-Identifier: Apache-2.0
// Parts of records as Python describes them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "codec/record.hpp"

namespace kv::bindings {

/// The order of kvstore.record.PlaneInfo: offset, nbytes, raw_nbytes, coding, crc32c, transform,
/// mult, low_bits, raw_rows, scale_class, segment_heads.
using EntryTuple = std::tuple<std::uint64_t,
                              std::uint64_t,
                              std::uint64_t,
                              unsigned,
                              std::uint32_t,
                              std::uint8_t,
                              std::int8_t,
                              std::uint8_t,
                              std::uint8_t,
                              std::uint8_t,
                              std::uint16_t>;

/// A part of a record; `data` is any buffer.
struct PartArguments {
  std::size_t first_plane;
  std::vector<EntryTuple> entries;
  std::size_t segment_tokens;
  pybind11::buffer data;
  std::uint64_t data_offset;
  std::size_t num_leading;

  /// @param bytes  those of `data`.
  [[nodiscard]] RecordPart part(ConstBytes bytes) const {
    RecordPart made{first_plane, {}, segment_tokens, bytes, data_offset, num_leading};
    made.planes.reserve(entries.size());
    for (const EntryTuple& tuple : entries) {
      PlaneEntry entry;
      unsigned coding = 0;
      std::tie(entry.offset, entry.nbytes, entry.raw_nbytes, coding, entry.crc32c, entry.transform,
               entry.mult, entry.low_bits, entry.raw_rows, entry.scale_class, entry.segment_heads) =
          tuple;
      entry.coding = coding_from(coding);
      made.planes.push_back(entry);
    }
    return made;
  }
};

}  // namespace kv::bindings
