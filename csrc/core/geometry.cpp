// SPDX-License-Identifier: Apache-2.0
// Limits and offsets of slots.
#include "core/geometry.hpp"

#include <string>

#include "core/span.hpp"

namespace kv {
namespace {

std::size_t checked_size(const char* name, std::uint64_t value) {
  KV_EXPECT(value >= 1 && value <= 65535, ShapeError,
            std::string(name) + " is " + std::to_string(value) + "; it must be 1 to 65535");
  return static_cast<std::size_t>(value);
}

}  // namespace

Geometry::Geometry(std::uint64_t num_layers,
                   std::uint64_t kv_heads,
                   std::uint64_t key_dim,
                   std::uint64_t value_dim,
                   std::uint64_t itemsize,
                   std::uint64_t block_tokens)
    : num_layers_(checked_size("num_layers", num_layers)),
      kv_heads_(checked_size("kv_heads", kv_heads)),
      key_dim_(checked_size("key_dim", key_dim)),
      value_dim_(checked_size("value_dim", value_dim)),
      itemsize_(checked_size("itemsize", itemsize)),
      block_tokens_(checked_size("block_tokens", block_tokens)) {
  KV_EXPECT(itemsize == 2 || itemsize == 4, ShapeError,
            "itemsize is " + std::to_string(itemsize) + "; it must be 2 or 4");
  for (const std::size_t plane : {std::size_t{0}, std::size_t{1}}) {
    const std::size_t nbytes = kv_heads_ * head_nbytes(plane);
    KV_EXPECT(nbytes <= kMaxPlaneNbytes, ShapeError,
              "a plane of " + std::to_string(nbytes) + " bytes is beyond the limit of 1 GiB");
  }
}

std::size_t Geometry::plane_offset(std::size_t plane) const noexcept {
  const std::size_t layer_nbytes = kv_heads_ * (head_nbytes(0) + head_nbytes(1));
  return (plane / 2) * layer_nbytes + (plane % 2 == 0 ? 0 : kv_heads_ * head_nbytes(0));
}

std::size_t Geometry::slot_nbytes() const noexcept {
  return static_cast<std::size_t>(round_up(plane_offset(num_planes()), kPageNbytes));
}

}  // namespace kv
