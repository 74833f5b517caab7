// SPDX-License-Identifier: Apache-2.0
// An entropy-coded plane, opened for reading: how read_planes drives it, segment by segment.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "planes/parameters.hpp"
#include "planes/plane.hpp"

namespace kv {

/// What one segment carries from row to row.
struct SegmentState {
  std::vector<float> rebuilt;  ///< [heads of the segment, dim], dpcm only
  std::vector<int> scales;     ///< [heads of the segment, tokens of the segment], axis 1 only
  std::vector<float> steps;    ///< likewise: of a channel that adds what its head's first one does
  std::vector<float> row_steps;         ///< [dim], axis 1 only
  std::vector<std::int16_t> widened;    ///< a few rows of [padded dim], low bits only
  std::vector<std::uint8_t> discarded;  ///< a row that nobody wants
};

/// Not thread-safe in its SegmentState only: several threads may read different segments.
class PlaneReader {
 public:
  PlaneReader(std::size_t plane, const PlaneShape& shape, const SegmentGrid& grid)
      : plane_(plane), shape_(shape), grid_(grid) {}
  PlaneReader(const PlaneReader&) = delete;
  PlaneReader& operator=(const PlaneReader&) = delete;
  virtual ~PlaneReader() = default;

  [[nodiscard]] std::size_t plane() const noexcept { return plane_; }
  [[nodiscard]] const PlaneShape& shape() const noexcept { return shape_; }
  [[nodiscard]] const SegmentGrid& grid() const noexcept { return grid_; }
  /// Tokens before the first coded one.
  [[nodiscard]] virtual std::size_t raw_rows() const noexcept { return 0; }

  /// Copies what no segment holds: raw rows.
  virtual void write_raw_rows(const WindowTarget& target) const = 0;

  [[nodiscard]] virtual const ReadEntry* table() const noexcept = 0;
  /// [groups of a row, 2, 32] of a segment's rows; `is_first`: of its first token.
  [[nodiscard]] virtual const std::uint32_t* bases(const Segment& segment, bool is_first) const = 0;
  /// Points `reader` at a segment, and reads what stands before its rows.
  virtual void begin(std::size_t index, RansReader& reader, SegmentState& state) const = 0;
  /// Writes the wanted ones of `rows` rows, the first of which is `first_row` of the segment.
  /// @param symbols  [rows, groups of a row, 64].
  virtual void write_rows(const Segment& segment,
                          std::size_t first_row,
                          std::size_t rows,
                          const std::uint8_t* symbols,
                          SegmentState& state,
                          const WindowTarget& target) const = 0;
  /// What comes after the last row. @throws CorruptRecord.
  virtual void end(std::size_t index, const WindowTarget& target) const = 0;

 private:
  std::size_t plane_;
  PlaneShape shape_;
  SegmentGrid grid_;
};

/// A plane and where its rows are wanted.
struct PlaneJob {
  const PlaneReader* reader;
  WindowTarget target;
};

/// Reads planes; segments of the same shape are read side by side, whichever plane they are of.
///
/// Segments outside a window are not looked at.
/// @throws CorruptRecord that names plane and segment; wanted rows are unspecified then.
void read_planes(const std::vector<PlaneJob>& jobs);

}  // namespace kv
