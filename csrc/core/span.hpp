// SPDX-License-Identifier: Apache-2.0
// Byte ranges whose sub-ranges are checked, and arithmetic on untrusted sizes that cannot wrap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/error.hpp"

namespace kv {

/// True when [offset, offset + nbytes) lies inside [0, total).
[[nodiscard]] constexpr bool fits(std::uint64_t offset,
                                  std::uint64_t nbytes,
                                  std::uint64_t total) noexcept {
  return offset <= total && nbytes <= total - offset;
}

/// Smallest multiple of `alignment` (a power of two) that is not below `nbytes`; `nbytes` is below
/// 2^63.
[[nodiscard]] constexpr std::uint64_t round_up(std::uint64_t nbytes,
                                               std::uint64_t alignment) noexcept {
  return (nbytes + alignment - 1) & ~(alignment - 1);
}

/// View of caller-owned bytes; copies freely, frees nothing.
template <typename Byte>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(Byte* data, std::size_t size) noexcept : data_(data), size_(size) {}

  [[nodiscard]] constexpr Byte* data() const noexcept { return data_; }
  [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }

  /// @throws ShapeError when the range is not inside this span.
  [[nodiscard]] Span sub(std::uint64_t offset, std::uint64_t nbytes) const {
    KV_EXPECT(fits(offset, nbytes, size_), ShapeError,
              "range of " + std::to_string(nbytes) + " bytes at " + std::to_string(offset) +
                  " is outside a buffer of " + std::to_string(size_) + " bytes");
    return Span(data_ + offset, static_cast<std::size_t>(nbytes));
  }

 private:
  Byte* data_ = nullptr;
  std::size_t size_ = 0;
};

using Bytes = Span<std::uint8_t>;
using ConstBytes = Span<const std::uint8_t>;

}  // namespace kv
