// SPDX-License-Identifier: Apache-2.0
// Where the rows of a block lie in memory that warps read or write.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/record.hpp"
#include "warp/jobs.hpp"

namespace kv::warp {

/// Where the rows of one plane lie: strides in bytes, elements of a row contiguous. The caller
/// vouches for the memory that they reach.
struct PlaneTarget {
  std::uint64_t address;  ///< of page 0, head 0, row 0
  std::uint64_t head_stride;
  std::uint64_t row_stride;
  std::uint64_t page_stride;  ///< paged targets only, like the next
  std::uint64_t num_pages;
};

/// How the rows of a block are spread over pages; the same for all of its planes.
struct Paging {
  std::uint32_t page_tokens = 0;
  std::uint32_t first_row = 0;      ///< the block's first token in its first page
  std::vector<std::int32_t> slots;  ///< page by page; empty: the block's rows follow each other
};

/// @throws ShapeError for targets that are not one a plane, not aligned to their elements, or
/// outside their pages.
void check_places(const BlockView& block,
                  std::size_t num_planes,
                  const std::vector<PlaneTarget>& targets,
                  const Paging& paging);

/// A job with the places of one plane's rows and its sizes; all else is left to the caller.
[[nodiscard]] PlaneJob place_rows(const BlockView& block,
                                  std::size_t plane,
                                  std::size_t raw_rows,
                                  const PlaneTarget& target,
                                  const Paging& paging);

}  // namespace kv::warp
