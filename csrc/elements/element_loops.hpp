// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one row, element by element (FORMAT.md sections 6.5, 6.6 and 9).
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements/dtype.hpp"

namespace kv {

/// How the elements of one head's row are transformed; arrays are per channel, [dim].
struct RowTransform {
  const float* steps;          ///< null: `step` holds for all
  const float* inverse_steps;  ///< null like `steps`
  float step;
  float inverse_step;
  const float* mean;  ///< null: none
  const float* rho;   ///< null: no dpcm
  float* state;       ///< [dim], r of the token before, zeros at the start; null like `rho`
};

/// Rows of one head to quantise, in the order of their tokens.
struct QuantiseRows {
  const std::uint8_t* source;    ///< the first row
  std::ptrdiff_t source_stride;  ///< from row to row, in bytes
  std::size_t rows;
  std::size_t dim;
  RowTransform transform;
  const float* row_steps;          ///< [rows], instead of transform.step; null: one step for all
  const float* row_inverse_steps;  ///< null like `row_steps`
  const float* largest;            ///< [dim], RADIUS of each channel's class
  unsigned low_bits;
  std::int8_t* symbols;        ///< [dim] of the first row
  std::size_t symbols_stride;  ///< from row to row
  std::uint8_t* lows;          ///< [rows, dim]
  std::uint8_t* flags;         ///< [rows, dim], 1 for an exception
};

/// Rows of one head to bring back, in the order of their tokens.
template <typename Quantised>
struct RestoreRows {
  const Quantised* quantised;    ///< the first row, [dim]
  std::size_t quantised_stride;  ///< from row to row, in elements
  std::size_t rows;
  std::size_t dim;
  RowTransform transform;
  const float* row_steps;  ///< [rows], instead of transform.step; null: one step for all
  std::uint8_t* target;
  std::ptrdiff_t target_stride;  ///< from row to row, in bytes
};

/// The loops for one dtype and CPU.
struct ElementLoops {
  /// Elements as numbers, infinities and NaNs as 0.
  void (*load)(const std::uint8_t* source, std::size_t dim, float* values) noexcept;
  /// sum16 of the squares of what `load` gives.
  float (*energy)(const std::uint8_t* source, std::size_t dim) noexcept;
  /// Returns true when a flag was set.
  bool (*quantise)(const QuantiseRows& rows) noexcept;
  void (*restore8)(const RestoreRows<std::int8_t>& rows) noexcept;
  void (*restore16)(const RestoreRows<std::int16_t>& rows) noexcept;
};

/// The fastest loops that this machine offers; all make the same bytes.
[[nodiscard]] const ElementLoops& element_loops(DType dtype) noexcept;

/// sum16 of section 9.
[[nodiscard]] float sum16(const float* values, std::size_t count) noexcept;

}  // namespace kv
