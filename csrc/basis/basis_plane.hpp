// SPDX-License-Identifier: Apache-2.0
// Coding 4: one side of a group of layers as sums of calibrated components (FORMAT.md section 11;
// KVTC, arXiv 2511.01815).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "basis/basis.hpp"
#include "basis/basis_loops.hpp"
#include "planes/parameters.hpp"
#include "planes/plane.hpp"
#include "planes/plane_reader.hpp"

namespace kv {

/// K or V of the layers of one group, in one record.
struct GroupShape {
  const Basis* basis;
  std::vector<const PlaneParameters*> parameters;  ///< [layers]
  std::size_t first_plane;                         ///< the one that holds the group's bytes
  std::size_t tokens;
  DType dtype;
  std::size_t segment_tokens;

  [[nodiscard]] PlaneShape symbols() const noexcept {
    return symbol_shape(*basis, tokens, segment_tokens);
  }
  [[nodiscard]] std::size_t row_nbytes() const noexcept { return basis->dim * itemsize_of(dtype); }
};

/// Scales are told in units of this many codes.
constexpr int kScaleShift = 2;
constexpr int kScaleUnit = 1 << kScaleShift;

/// Steps and means of a group's rows.
class GroupWeights {
 public:
  GroupWeights(const GroupShape& shape, int mult);

  /// @param row    layer x heads + head.
  /// @param scale  the symbol of the row's scale; of K: any.
  /// @param room   [2, dim], for what depends on it.
  [[nodiscard]] RowWeights of_row(std::size_t row, int scale, float* room) const noexcept;

 private:
  const GroupShape& shape_;
  int mult_;
  std::vector<float> steps_;          ///< [layers, heads, dim], K only
  std::vector<float> inverse_steps_;  ///< likewise
  std::vector<RowSteps> offsets_;     ///< [layers], V only
};

/// Writes a group.
/// @param raw_rows  leading tokens that are exact anyway.
/// @param sources   one per layer.
/// @param entry     of the first layer; all fields but offset, lengths and checksum are set.
/// @return          bytes written; 0 when `room` is too small.
std::size_t write_basis_group(const GroupShape& shape,
                              int mult,
                              std::size_t raw_rows,
                              const std::vector<SourceRows>& sources,
                              PlaneEntry& entry,
                              Bytes room);

/// Reads a group in three steps, the first of which is done for many at once.
class BasisReader {
 public:
  virtual ~BasisReader() = default;

  /// What read_planes is to do: the symbols.
  [[nodiscard]] virtual PlaneJob job() = 0;
  /// Prepares what `restore` needs of them.
  virtual void gather() = 0;
  /// Writes the wanted rows of one layer of the group, counted in it.
  virtual void restore(std::size_t layer, const TargetRows& target) const = 0;
};

/// Opens a group whose checksum matches; `stored` and what `shape` points to outlive it, `stored`
/// is not trusted otherwise.
/// @param window  heads and tokens that are wanted.
/// @throws CorruptRecord that names the plane.
[[nodiscard]] std::unique_ptr<BasisReader> open_basis_group(const GroupShape& shape,
                                                            const PlaneEntry& entry,
                                                            ConstBytes stored,
                                                            const Window& window);

}  // namespace kv
