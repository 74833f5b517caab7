// SPDX-License-Identifier: Apache-2.0
// Rows of floats <-> 8-bit codes with one scale a row (FORMAT.md section 3, coding 2).
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/container.hpp"

namespace kv {

/// True when none of `count` elements at `source` is an infinity or a NaN.
[[nodiscard]] bool all_finite(const std::uint8_t* source, std::size_t count, DType dtype) noexcept;

/// Quantises `rows` rows of `dim` finite elements.
/// @param scales  4 x rows bytes, float32. @param codes  rows x dim bytes, int8.
void quantize_rows(const std::uint8_t* source,
                   std::size_t rows,
                   std::size_t dim,
                   DType dtype,
                   std::uint8_t* scales,
                   std::uint8_t* codes) noexcept;

/// Inverse up to rounding; every value written is finite.
/// @return false, with nothing written for that row, when a scale or code violates the format.
[[nodiscard]] bool dequantize_rows(const std::uint8_t* scales,
                                   const std::uint8_t* codes,
                                   std::size_t rows,
                                   std::size_t dim,
                                   DType dtype,
                                   std::uint8_t* destination) noexcept;

}  // namespace kv
