// SPDX-License-Identifier: Apache-2.0
// Little-endian loads and stores at any alignment; the only way that fields of a record are read or
// written.
#pragma once

#include <cstdint>
#include <cstring>

namespace kv {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "FORMAT.md is little-endian and tensors are stored in host order");

template <typename Integer>
[[nodiscard]] inline Integer load_le(const std::uint8_t* source) noexcept {
  Integer value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <typename Integer>
inline void store_le(std::uint8_t* destination, Integer value) noexcept {
  std::memcpy(destination, &value, sizeof(value));
}

}  // namespace kv
