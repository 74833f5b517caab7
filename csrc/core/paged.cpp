// SPDX-License-Identifier: Apache-2.0
// The CPU twin of cuda/paged.cu.
#include "core/paged.hpp"

#include <cstring>
#include <string>

#include "core/endian.hpp"

namespace kv {
namespace {

std::int32_t entry(ConstBytes table, std::size_t index) {
  return load_le<std::int32_t>(table.data() + index * sizeof(std::int32_t));
}

void check_table(const PagedPlane& plane, ConstBytes slots, ConstBytes row_starts, Bytes dense) {
  const std::size_t num_blocks = slots.size() / sizeof(std::int32_t);
  KV_EXPECT(slots.size() % sizeof(std::int32_t) == 0 &&
                row_starts.size() == (num_blocks + 1) * sizeof(std::int32_t),
            ShapeError,
            "block table of " + std::to_string(slots.size()) + " bytes with row starts of " +
                std::to_string(row_starts.size()) + " bytes; they are int32[n] and int32[n + 1]");
  KV_EXPECT(entry(row_starts, 0) == 0, ShapeError, "row_starts must begin with 0");
  for (std::size_t block = 0; block < num_blocks; ++block) {
    const std::int64_t slot = entry(slots, block);
    const std::int64_t rows = std::int64_t{entry(row_starts, block + 1)} - entry(row_starts, block);
    KV_EXPECT(slot >= 0 && static_cast<std::uint64_t>(slot) < plane.num_slots, ShapeError,
              "block " + std::to_string(block) + " names slot " + std::to_string(slot) + " of " +
                  std::to_string(plane.num_slots));
    KV_EXPECT(rows >= 0 && rows <= std::int64_t{plane.block_tokens}, ShapeError,
              "block " + std::to_string(block) + " has " + std::to_string(rows) +
                  " rows; a slot has " + std::to_string(plane.block_tokens));
  }
  const auto num_rows = static_cast<std::uint64_t>(entry(row_starts, num_blocks));
  const std::uint64_t wanted = num_rows * plane.kv_heads * plane.row_nbytes;
  KV_EXPECT(
      dense.size() == wanted, ShapeError,
      "dense rows need " + std::to_string(wanted) + " bytes; got " + std::to_string(dense.size()));
}

}  // namespace

PagedPlane paged_plane(const Geometry& geometry, std::size_t plane, std::uint64_t pool_nbytes) {
  KV_EXPECT(plane < geometry.num_planes(), ShapeError,
            "plane " + std::to_string(plane) + " of " + std::to_string(geometry.num_planes()));
  KV_EXPECT(pool_nbytes % geometry.slot_nbytes() == 0, ShapeError,
            "a pool of " + std::to_string(pool_nbytes) +
                " bytes is not a whole number of slots of " +
                std::to_string(geometry.slot_nbytes()));
  return PagedPlane{pool_nbytes / geometry.slot_nbytes(),
                    geometry.slot_nbytes(),
                    geometry.plane_offset(plane),
                    geometry.head_nbytes(plane),
                    geometry.row_nbytes(plane),
                    static_cast<std::uint32_t>(geometry.kv_heads()),
                    static_cast<std::uint32_t>(geometry.block_tokens())};
}

void move_paged_rows(PagedMove move,
                     const PagedPlane& plane,
                     Bytes pool,
                     ConstBytes slots,
                     ConstBytes row_starts,
                     Bytes dense) {
  check_table(plane, slots, row_starts, dense);
  const std::size_t num_blocks = slots.size() / sizeof(std::int32_t);
  for (std::size_t block = 0; block < num_blocks; ++block) {
    const auto slot = static_cast<std::uint64_t>(entry(slots, block));
    const auto first = static_cast<std::uint64_t>(entry(row_starts, block));
    const auto rows = static_cast<std::uint64_t>(entry(row_starts, block + 1)) - first;
    std::uint8_t* source = pool.data() + slot * plane.slot_nbytes + plane.plane_offset;
    for (std::uint64_t row = 0; row < rows; ++row) {
      for (std::uint64_t head = 0; head < plane.kv_heads; ++head) {
        std::uint8_t* paged = source + head * plane.head_nbytes + row * plane.row_nbytes;
        std::uint8_t* flat =
            dense.data() + ((first + row) * plane.kv_heads + head) * plane.row_nbytes;
        const bool is_gather = move == PagedMove::kGather;
        std::memcpy(is_gather ? flat : paged, is_gather ? paged : flat, plane.row_nbytes);
      }
    }
  }
}

}  // namespace kv
