// SPDX-License-Identifier: Apache-2.0
// Directories of records, and parts of records, as Python holds them.
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

/// Layers of a record; `data` is any buffer.
struct PartArguments {
  RecordPart planes;  ///< without its bytes
  pybind11::buffer data;

  /// @param bytes  those of `data`.
  [[nodiscard]] RecordPart part(ConstBytes bytes) const {
    RecordPart made = planes;
    made.data = bytes;
    return made;
  }
};

/// The directory of a probed record. Python passes it back unread: making tuples of its planes
/// costs as much as decoding some of them.
class PlaneDirectory {
 public:
  explicit PlaneDirectory(const RecordInfo& info)
      : planes_(info.planes), segment_tokens_(info.segment_tokens) {}

  [[nodiscard]] std::vector<EntryTuple> entries() const;

  /// Offset and nbytes of what holds layers [first, end): their planes, padding included, and those
  /// before them of the same groups.
  /// @throws ShapeError unless there are such layers, at least one. The others likewise.
  [[nodiscard]] std::tuple<std::uint64_t, std::uint64_t> span(std::size_t first,
                                                              std::size_t end) const;
  /// True when layers [first, end) cannot be read without a calibration.
  [[nodiscard]] bool needs_calibration(std::size_t first, std::size_t end) const;

  /// @param data  bytes of the record from `data_offset` on.
  [[nodiscard]] PartArguments part(std::size_t first,
                                   std::size_t end,
                                   pybind11::buffer data,
                                   std::uint64_t data_offset) const;

 private:
  void check(std::size_t first, std::size_t end) const;

  std::vector<PlaneEntry> planes_;
  std::size_t segment_tokens_;
};

}  // namespace kv::bindings
