// SPDX-License-Identifier: Apache-2.0
// Numbers and names of planes.
#include "planes/plane.hpp"

#include <cstring>

namespace kv {

DType dtype_from(unsigned number) {
  KV_EXPECT(number <= static_cast<unsigned>(DType::kFloat32), ShapeError,
            "unknown dtype number " + std::to_string(number));
  return static_cast<DType>(number);
}

Coding coding_from(unsigned number) {
  KV_EXPECT(number <= static_cast<unsigned>(Coding::kBasis), ShapeError,
            "unknown coding number " + std::to_string(number));
  return static_cast<Coding>(number);
}

std::string plane_name(std::size_t plane) {
  return (plane % 2 == 0 ? "K of layer " : "V of layer ") + std::to_string(plane / 2);
}

void SectionWriter::append(const void* data, std::size_t nbytes) noexcept {
  if (std::uint8_t* to = take(nbytes); to != nullptr && nbytes > 0) {
    std::memcpy(to, data, nbytes);
  }
}

void SectionWriter::pad() noexcept {
  const auto missing = static_cast<std::size_t>(round_up(at_, kSectionAlignment) - at_);
  if (std::uint8_t* to = take(missing); to != nullptr) {
    std::memset(to, 0, missing);
  }
}

}  // namespace kv
