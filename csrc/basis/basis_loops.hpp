// SPDX-License-Identifier: Apache-2.0
// The arithmetic of bases (FORMAT.md section 11.4): binary32, sums in ascending order, a
// product rounded before it is added, so that every CPU makes the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "planes/plane.hpp"

namespace kv {

/// Tokens that the forward loop works on side by side.
constexpr std::size_t kTokenTile = 32;

/// From weighted elements to components.
struct ForwardSums {
  const float* weighted;            ///< [rows, dim, kTokenTile]
  const std::uint16_t* components;  ///< [rows, rank, dim], bfloat16
  std::size_t rows;
  std::size_t rank;
  std::size_t dim;
  float* sums;  ///< [rank, kTokenTile]
};

/// What one row of a token is the sum of: components that are not zero. The others would add
/// nothing, to the bit.
struct InverseSums {
  const std::uint32_t* numbers;     ///< [count], ascending
  const float* values;              ///< [count]
  std::size_t count;                ///< of components that are not zero
  const std::uint16_t* components;  ///< [rank, dim] of this row, bfloat16
  std::size_t dim;
  float* sums;  ///< [dim]
};

/// How one row is weighed; arrays are [dim].
struct RowWeights {
  const float* steps;
  const float* inverse_steps;  ///< of a writer only
  const float* means;          ///< null: none
  std::size_t dim;
};

/// The loops for one dtype and CPU.
struct BasisLoops {
  void (*forward)(const ForwardSums& sums) noexcept;
  void (*inverse)(const InverseSums& sums) noexcept;
  /// (element - mean) / step; returns true for a row with an infinity or a NaN.
  bool (*weigh)(const std::uint8_t* source, const RowWeights& weights, float* weighted) noexcept;
  /// sum * step + mean, as elements.
  void (*restore)(const float* sums, const RowWeights& weights, std::uint8_t* target) noexcept;
  /// Squares of how far that is off, in steps; returns true when an element would not be finite.
  bool (*compare)(const float* sums,
                  const RowWeights& weights,
                  const std::uint8_t* source,
                  float* squares) noexcept;
};

/// The fastest loops that this machine offers; all make the same bytes.
[[nodiscard]] const BasisLoops& basis_loops(DType dtype) noexcept;

}  // namespace kv
