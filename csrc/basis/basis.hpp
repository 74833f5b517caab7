// SPDX-License-Identifier: Apache-2.0
// What a calibration says of one side of a group of layers: components that keys or values are sums
// of (FORMAT.md sections 8.1 and 11.2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.hpp"
#include "planes/plane.hpp"

namespace kv {

/// Of `layers` consecutive layers. A token has `entries()` symbols: one a component, then, of V,
/// one a row for its scale.
struct Basis {
  std::size_t layers = 0;
  std::size_t heads = 0;
  std::size_t dim = 0;
  std::size_t rank = 0;                       ///< 0: the group has no basis
  std::vector<std::int16_t> log_sigma;        ///< [rank]
  std::vector<std::int16_t> scale_base;       ///< [layers, heads], V only
  std::vector<std::int16_t> scale_log_sigma;  ///< [layers, heads], V only
  std::vector<std::uint16_t> components;      ///< [layers, heads, rank, dim], bfloat16

  [[nodiscard]] std::size_t rows() const noexcept { return layers * heads; }
  [[nodiscard]] std::size_t channels() const noexcept { return rows() * dim; }
  [[nodiscard]] bool has_scales() const noexcept { return !scale_base.empty(); }
  [[nodiscard]] std::size_t entries() const noexcept { return rank + scale_base.size(); }
  /// Symbols lie in runs of 64, as heads of an ordinary plane do.
  [[nodiscard]] std::size_t runs() const noexcept { return (entries() + kGroup - 1) / kGroup; }

  /// [runs, 64]: the class of every symbol; what pads the last run has the null class.
  [[nodiscard]] std::vector<std::uint8_t> classes(int mult) const;
};

/// Of one side of all layers: how many layers a group has, and the groups' bases.
struct Bases {
  std::size_t group_layers = 0;  ///< 0: there are none
  std::vector<Basis> keys;
  std::vector<Basis> values;

  [[nodiscard]] const Basis& of_plane(std::size_t plane) const {
    return (plane % 2 == 0 ? keys : values).at(plane / 2 / group_layers);
  }
};

/// Sizes of a model, as its calibration states them.
struct ModelSizes {
  std::size_t layers;
  std::size_t heads;
  std::size_t key_dim;
  std::size_t value_dim;
};

/// Reads what follows a calibration's planes; `bytes` is not trusted, and nothing of it is kept.
/// @throws CorruptRecord.
[[nodiscard]] Bases read_bases(ConstBytes bytes, const ModelSizes& sizes);

/// A plane of symbols instead of elements: [runs, tokens, 64].
[[nodiscard]] PlaneShape symbol_shape(const Basis& basis,
                                      std::size_t tokens,
                                      std::size_t segment_tokens) noexcept;

/// segment_heads as section 11.4 chooses it.
[[nodiscard]] std::size_t chosen_segment_runs(std::size_t runs,
                                              std::size_t tokens,
                                              std::size_t segment_tokens) noexcept;

}  // namespace kv
