// SPDX-License-Identifier: Apache-2.0
// Elements of one plane -> symbols, low bits and exceptions (FORMAT.md section 6.6).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "elements/element_loops.hpp"
#include "planes/parameters.hpp"
#include "planes/plane.hpp"
#include "planes/quantised_plane.hpp"
#include "planes/scales.hpp"

namespace kv {

/// What one segment becomes.
struct QuantisedSegment {
  std::vector<std::uint8_t> symbols;  ///< [tokens, heads, padded dim]
  std::vector<std::uint8_t> indices;  ///< of exceptions, two bytes each
  std::vector<std::uint8_t> bits;     ///< of exceptions, an element each
};

/// Everything that quantising one plane looks up. All arguments outlive it.
class PlaneQuantiser {
 public:
  PlaneQuantiser(const PlaneShape& shape,
                 const QuantisedChoice& choice,
                 const PlaneParameters* parameters,
                 const PlaneEntry& entry,
                 const Scales& scales);

  [[nodiscard]] const SegmentGrid& grid() const noexcept { return grid_; }
  /// The section of low bits, once all segments are quantised.
  [[nodiscard]] const std::vector<std::uint8_t>& lows() const noexcept { return lows_; }
  /// [groups of a row, 2, 32] into the table of WriteEntry; `is_first`: of the first token.
  [[nodiscard]] const std::uint32_t* bases(const Segment& segment, bool is_first) const noexcept {
    return (is_first ? first_ : rest_).bases.data() + segment.first_head * grid_.padded_dim();
  }

  [[nodiscard]] QuantisedSegment quantise(const Segment& segment, const SourceRows& source);

 private:
  struct ChannelClasses {
    std::vector<float> radii;
    std::vector<std::uint32_t> bases;
  };
  struct Flagged {
    std::uint32_t index;
    std::uint32_t bits;
  };

  [[nodiscard]] ChannelClasses classes_of(bool is_first) const;
  // True when every row of a head has steps of its own that differ from channel to channel.
  [[nodiscard]] bool has_steps_of_rows(std::size_t head) const noexcept;
  void set_transform(std::size_t head, std::size_t row, QuantiseRows& job);
  void note_exceptions(const QuantiseRows& job, std::size_t entry, std::size_t heads);
  void list_exceptions(QuantisedSegment& segment);

  const PlaneShape& shape_;
  const QuantisedChoice& choice_;
  const PlaneParameters* parameters_;
  const PlaneEntry& entry_;
  const Scales& scales_;
  SegmentGrid grid_;
  const ElementLoops& loops_;
  RowSteps offsets_;
  std::vector<std::uint8_t> lows_;
  ChannelClasses first_;
  ChannelClasses rest_;
  std::vector<float> steps_;          // [heads, dim], axes but kToken
  std::vector<float> inverse_steps_;  // likewise
  // Of the rows that are quantised together.
  std::vector<std::uint8_t> low_rows_;
  std::vector<std::uint8_t> flags_;
  std::vector<float> state_;
  std::vector<float> row_steps_;
  std::vector<Flagged> flagged_;
};

}  // namespace kv
