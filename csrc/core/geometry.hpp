// SPDX-License-Identifier: Apache-2.0
// Where planes, heads and rows lie in a slot: the native twin of kvstore/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kv {

/// Slots are multiples of this many bytes, as O_DIRECT wants.
constexpr std::size_t kPageNbytes = 4096;

/// A plane holds at most this many bytes, so that sizes inside one fit 32 bits.
constexpr std::size_t kMaxPlaneNbytes = std::size_t{1} << 30;

/// Byte layout of one slot: layers outermost, then the K plane and the V plane, each [kv_heads,
/// block_tokens, dim].
///
/// Immutable. The limits checked at construction (16-bit sizes, planes of 1 GiB) keep all later
/// products below 2^48.
class Geometry {
 public:
  /// @throws ShapeError when a size is zero or beyond its limit, or `itemsize` is neither 2 nor 4.
  Geometry(std::uint64_t num_layers,
           std::uint64_t kv_heads,
           std::uint64_t key_dim,
           std::uint64_t value_dim,
           std::uint64_t itemsize,
           std::uint64_t block_tokens);

  [[nodiscard]] std::size_t num_layers() const noexcept { return num_layers_; }
  [[nodiscard]] std::size_t num_planes() const noexcept { return 2 * num_layers_; }
  [[nodiscard]] std::size_t kv_heads() const noexcept { return kv_heads_; }
  [[nodiscard]] std::size_t key_dim() const noexcept { return key_dim_; }
  [[nodiscard]] std::size_t value_dim() const noexcept { return value_dim_; }
  [[nodiscard]] std::size_t itemsize() const noexcept { return itemsize_; }
  [[nodiscard]] std::size_t block_tokens() const noexcept { return block_tokens_; }

  /// Elements of one row of plane `plane`; even planes are K, odd ones V.
  [[nodiscard]] std::size_t dim(std::size_t plane) const noexcept {
    return plane % 2 == 0 ? key_dim_ : value_dim_;
  }
  [[nodiscard]] std::size_t row_nbytes(std::size_t plane) const noexcept {
    return dim(plane) * itemsize_;
  }
  /// Bytes from one head to the next inside a slot's plane.
  [[nodiscard]] std::size_t head_nbytes(std::size_t plane) const noexcept {
    return block_tokens_ * row_nbytes(plane);
  }
  [[nodiscard]] std::size_t plane_offset(std::size_t plane) const noexcept;
  /// Bytes of the slot, rounded up to whole pages.
  [[nodiscard]] std::size_t slot_nbytes() const noexcept;

 private:
  std::size_t num_layers_;
  std::size_t kv_heads_;
  std::size_t key_dim_;
  std::size_t value_dim_;
  std::size_t itemsize_;
  std::size_t block_tokens_;
};

}  // namespace kv
