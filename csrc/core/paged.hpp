// SPDX-License-Identifier: Apache-2.0
// Moves one plane between paged slots and dense rows, by a block table.
#pragma once

#include <cstdint>

#include "core/geometry.hpp"
#include "core/span.hpp"

namespace kv {

enum class PagedMove { kGather, kScatter };

/// One plane of every slot in a pool, as plain numbers: the same value drives the CPU loop and the
/// CUDA kernel.
struct PagedPlane {
  std::uint64_t num_slots;
  std::uint64_t slot_nbytes;
  std::uint64_t plane_offset;
  std::uint64_t head_nbytes;
  std::uint64_t row_nbytes;
  std::uint32_t kv_heads;
  std::uint32_t block_tokens;
};

/// @throws ShapeError unless `plane` exists in `geometry` and `pool_nbytes` is a whole number of
/// slots.
[[nodiscard]] PagedPlane paged_plane(const Geometry& geometry,
                                     std::size_t plane,
                                     std::uint64_t pool_nbytes);

/// Copies rows between the slots that `slots` names and `dense`, [num_rows, kv_heads, dim].
///
/// Block i holds dense rows [row_starts[i], row_starts[i + 1]), in the first token rows of its
/// slot. When gathering, `pool` is only read; when scattering, `dense` is only read.
/// @param slots       num_blocks int32, slot numbers in `pool`; a slot may occur twice when
/// gathering.
/// @param row_starts  num_blocks + 1 int32, rising from 0 by at most block_tokens a step.
/// @throws ShapeError for a table or buffer that does not fit; nothing has been written then.
void move_paged_rows(PagedMove move,
                     const PagedPlane& plane,
                     Bytes pool,
                     ConstBytes slots,
                     ConstBytes row_starts,
                     Bytes dense);

}  // namespace kv
