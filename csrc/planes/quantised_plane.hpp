// SPDX-License-Identifier: Apache-2.0
// Coding 3: uniform steps, entropy-coded; what the alphabet cannot hold is exact (FORMAT.md section
// 6).
#pragma once

#include <cstddef>
#include <memory>

#include "planes/parameters.hpp"
#include "planes/plane.hpp"
#include "planes/plane_reader.hpp"

namespace kv {

/// What a writer chooses for one plane.
struct QuantisedChoice {
  Transform transform;
  int mult;
  std::size_t raw_rows;
  const PlaneParameters* parameters;  ///< null unless the source is the calibration
};

/// Writes a plane.
/// @param entry  all fields but offset, lengths and checksum are set.
/// @return       bytes written; 0 when `room` is too small.
std::size_t write_quantised_plane(const PlaneShape& shape,
                                  const QuantisedChoice& choice,
                                  const SourceRows& source,
                                  PlaneEntry& entry,
                                  Bytes room);

/// Opens a plane whose checksum matches; `stored` and `calibrated` outlive it, `stored` is not
/// trusted otherwise.
/// @param calibrated  the plane's parameters in the calibration; null when there is none.
/// @throws CorruptRecord that names the plane, ShapeError when a calibration is missing.
[[nodiscard]] std::unique_ptr<PlaneReader> open_quantised_plane(std::size_t plane,
                                                                const PlaneShape& shape,
                                                                const PlaneEntry& entry,
                                                                const PlaneParameters* calibrated,
                                                                ConstBytes stored);

}  // namespace kv
