// SPDX-License-Identifier: Apache-2.0
// Page-aligned host memory that direct I/O and device copies can use.
#pragma once

#include <cstddef>

#include "core/span.hpp"

namespace kv {

/// Owns one anonymous mapping, which lives until destruction: whoever views the memory keeps the
/// arena, so that nobody reads bytes that were given back.
class Arena {
 public:
  /// Maps `nbytes`, rounded up to whole pages, zero-filled, with huge-page advice; from 2 MiB on
  /// aligned to huge pages.
  /// @param pinned  page-lock it for device copies, spread over all NUMA nodes, every page present;
  /// without a CUDA device the memory stays plain.
  /// @throws CapacityError when the memory cannot be had, ShapeError when `nbytes` is 0.
  Arena(std::size_t nbytes, bool pinned);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  Arena(Arena&&) = delete;
  Arena& operator=(Arena&&) = delete;
  ~Arena();

  [[nodiscard]] Bytes bytes() const noexcept { return bytes_; }
  [[nodiscard]] bool is_pinned() const noexcept { return pinned_nbytes_ > 0; }

 private:
  // What is pinned at once from `offset` on.
  [[nodiscard]] Bytes part_at(std::size_t offset) const noexcept;
  void unpin() noexcept;

  Bytes bytes_;
  std::size_t pinned_nbytes_ = 0;
};

}  // namespace kv
