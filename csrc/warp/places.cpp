// SPDX-License-Identifier: Apache-2.0
// Checks places before a warp goes there.
#include "warp/places.hpp"

#include <limits>
#include <string>

namespace kv::warp {

void check_places(const BlockView& block,
                  std::size_t num_planes,
                  const std::vector<PlaneTarget>& targets,
                  const Paging& paging) {
  KV_EXPECT(
      !targets.empty() && targets.size() == num_planes, ShapeError,
      std::to_string(targets.size()) + " targets for " + std::to_string(num_planes) + " planes");
  const std::uint64_t rows = std::uint64_t{paging.first_row} + block.num_tokens;
  KV_EXPECT(
      paging.slots.empty() || (paging.page_tokens > 0 &&
                               rows <= std::uint64_t{paging.page_tokens} * paging.slots.size() &&
                               rows <= std::numeric_limits<std::uint32_t>::max()),
      ShapeError,
      std::to_string(paging.slots.size()) + " pages of " + std::to_string(paging.page_tokens) +
          " tokens have no room for rows " + std::to_string(paging.first_row) + " to " +
          std::to_string(rows));
  const std::size_t itemsize = block.geometry.itemsize();
  for (const PlaneTarget& target : targets) {
    const std::uint64_t all =
        target.address | target.head_stride | target.row_stride | target.page_stride;
    KV_EXPECT(all % itemsize == 0, ShapeError, "a target is not aligned to its elements");
    for (const std::int32_t slot : paging.slots) {
      KV_EXPECT(slot >= 0 && static_cast<std::uint64_t>(slot) < target.num_pages, ShapeError,
                "the block table names page " + std::to_string(slot) + " of " +
                    std::to_string(target.num_pages));
    }
  }
}

PlaneJob place_rows(const BlockView& block,
                    std::size_t plane,
                    std::size_t raw_rows,
                    const PlaneTarget& target,
                    const Paging& paging) {
  PlaneJob job{};
  const bool is_paged = !paging.slots.empty();
  job.target = target.address;
  job.head_stride = target.head_stride;
  job.row_stride = target.row_stride;
  job.page_stride = is_paged ? target.page_stride : 0;
  job.page_tokens = is_paged ? paging.page_tokens : std::numeric_limits<std::uint32_t>::max();
  job.first_row = is_paged ? paging.first_row : 0;
  job.heads = static_cast<std::uint32_t>(block.geometry.kv_heads());
  job.dim = static_cast<std::uint32_t>(block.geometry.dim(plane));
  job.raw_rows = static_cast<std::uint32_t>(raw_rows);
  job.tokens = static_cast<std::uint32_t>(block.num_tokens - raw_rows);
  job.dtype = block.dtype;
  const std::uint64_t all = job.target | job.head_stride | job.row_stride | job.page_stride;
  job.has_pairs = all % (2 * block.geometry.itemsize()) == 0;
  return job;
}

}  // namespace kv::warp
