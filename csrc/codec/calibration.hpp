// SPDX-License-Identifier: Apache-2.0
// The calibration object (FORMAT.md section 8), parsed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "basis/basis.hpp"
#include "core/span.hpp"
#include "planes/parameters.hpp"

namespace kv {

/// What names a calibration object; all zeros name none.
using CalibrationId = std::array<std::uint8_t, 16>;

/// Immutable; shared by all threads that code with it.
class Calibration {
 public:
  /// `bytes` is untrusted; nothing of it is kept. `id` is taken as it is: only the caller hashes.
  /// @throws UnsupportedFormat, CorruptRecord, ShapeError for an id of zeros.
  Calibration(ConstBytes bytes, const CalibrationId& id);

  [[nodiscard]] const CalibrationId& id() const noexcept { return id_; }
  [[nodiscard]] std::size_t num_layers() const noexcept { return planes_.size() / 2; }
  [[nodiscard]] std::size_t kv_heads() const noexcept { return kv_heads_; }
  [[nodiscard]] std::size_t key_dim() const noexcept { return key_dim_; }
  [[nodiscard]] std::size_t value_dim() const noexcept { return value_dim_; }
  [[nodiscard]] const PlaneParameters& plane(std::size_t plane) const { return planes_.at(plane); }
  /// Empty for an object without bases.
  [[nodiscard]] const Bases& bases() const noexcept { return bases_; }

 private:
  CalibrationId id_;
  std::size_t kv_heads_ = 0;
  std::size_t key_dim_ = 0;
  std::size_t value_dim_ = 0;
  std::vector<PlaneParameters> planes_;
  Bases bases_;
};

}  // namespace kv
