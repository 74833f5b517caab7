// SPDX-License-Identifier: Apache-2.0
// What decoding and encoding warps share: where rows lie, and arithmetic that no compiler fuses.
// segment_reader.hpp says what a Warp is.
#pragma once

#include <cstdint>

#include "warp/segment_reader.hpp"

namespace kv::warp {

// Nothing may be fused, whatever the compiler's flags say.
KV_WARP float product(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

KV_WARP float sum(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

/// Smallest multiple of `alignment`, a power of two, that is not below `nbytes`.
KV_WARP std::uint64_t padded_to(std::uint64_t nbytes, std::uint64_t alignment) {
  return (nbytes + alignment - 1) & ~(alignment - 1);
}

/// Where row `token` of the block goes, for one head.
template <typename Warp>
KV_WARP std::uint64_t row_address(Warp& warp,
                                  const PlaneJob& plane,
                                  std::uint32_t head,
                                  std::uint32_t token) {
  const std::uint32_t row = plane.first_row + token;
  const std::uint32_t page = row / plane.page_tokens;
  const auto slot = warp.template load<std::uint32_t>(plane.page_table + 4 * std::uint64_t{page});
  return plane.target + slot * plane.page_stride + head * plane.head_stride +
         (row - page * plane.page_tokens) * plane.row_stride;
}

/// Two neighbours of a row, written at once where the target allows it.
template <typename Bits>
struct alignas(2 * sizeof(Bits)) Pair {
  Bits first;
  Bits second;
};

}  // namespace kv::warp
