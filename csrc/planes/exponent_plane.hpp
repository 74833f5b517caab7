// SPDX-License-Identifier: Apache-2.0
// Coding 2: exponents by frequency, everything else as it is; bit-exact (FORMAT.md section 5).
#pragma once

#include <cstddef>
#include <memory>

#include "planes/plane.hpp"
#include "planes/plane_reader.hpp"

namespace kv {

/// Writes a plane.
/// @param is_key  K planes may have several tables.
/// @param entry   coding and segment_heads are set.
/// @return        bytes written; 0 when `room` is too small.
std::size_t write_exponent_plane(
    const PlaneShape& shape, bool is_key, const SourceRows& source, PlaneEntry& entry, Bytes room);

/// Opens a plane whose checksum matches; `stored` outlives it and is not trusted otherwise.
/// @throws CorruptRecord that names the plane.
[[nodiscard]] std::unique_ptr<PlaneReader> open_exponent_plane(std::size_t plane,
                                                               const PlaneShape& shape,
                                                               const PlaneEntry& entry,
                                                               ConstBytes stored);

}  // namespace kv
