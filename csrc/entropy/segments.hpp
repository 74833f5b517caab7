// SPDX-License-Identifier: Apache-2.0
// How a plane is cut into segments, and how their channels map to lanes (FORMAT.md sections 4.1 and
// 4.2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "entropy/rans.hpp"

namespace kv {

constexpr std::size_t kMaxSegmentSymbols = 65536;

struct Segment {
  std::size_t first_head;
  std::size_t num_heads;
  std::size_t first_token;
  std::size_t num_tokens;
};

struct SegmentGrid {
  std::size_t heads;
  std::size_t dim;
  std::size_t tokens;  ///< coded ones
  std::size_t segment_heads;
  std::size_t segment_tokens;

  /// True when the sizes are not zero and no segment has too many symbols.
  [[nodiscard]] bool is_valid() const noexcept;

  /// Groups of one head's row.
  [[nodiscard]] std::size_t head_groups() const noexcept { return (dim + kGroup - 1) / kGroup; }
  [[nodiscard]] std::size_t padded_dim() const noexcept { return head_groups() * kGroup; }
  [[nodiscard]] std::size_t size() const noexcept;
  [[nodiscard]] Segment at(std::size_t index) const noexcept;
};

/// Cuts as section 9 wants it. `largest_dim` is the larger of the record's two.
[[nodiscard]] std::size_t chosen_segment_tokens(std::size_t num_tokens, std::size_t largest_dim);
[[nodiscard]] std::size_t chosen_segment_heads(std::size_t heads,
                                               std::size_t dim,
                                               std::size_t coded_tokens,
                                               std::size_t segment_tokens);

/// Bases for read_groups and write_groups: [heads, groups, 2, 32], from one page number per
/// channel.
///
/// @param pages  [heads, dim]. @param null_page  for the entries that pad a row.
[[nodiscard]] std::vector<std::uint32_t> lane_bases(const std::uint8_t* pages,
                                                    std::size_t heads,
                                                    std::size_t dim,
                                                    std::size_t null_page,
                                                    std::size_t page_size);

}  // namespace kv
