// SPDX-License-Identifier: Apache-2.0
// What elements are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kv {

enum class DType : std::uint8_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

/// Bytes of an element.
[[nodiscard]] constexpr std::size_t itemsize_of(DType dtype) noexcept {
  return dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace kv
