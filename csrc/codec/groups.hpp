// SPDX-License-Identifier: Apache-2.0
// Planes of coding basis belong together: those of one side of consecutive layers, the first of
// which holds the bytes of all (FORMAT.md section 11.1).
#pragma once

#include <cstddef>
#include <vector>

#include "basis/basis_plane.hpp"
#include "codec/calibration.hpp"
#include "core/span.hpp"
#include "planes/plane.hpp"

namespace kv {

/// For every one of some consecutive planes, where among them the one lies that holds its bytes:
/// its own place, except in a group.
/// @throws CorruptRecord when it is not among them.
[[nodiscard]] std::vector<std::size_t> holders_of(const std::vector<PlaneEntry>& planes,
                                                  std::size_t first_plane);

/// The first layer whose planes hold bytes of those of `layer`: its own, except in a group.
/// @param planes  of a whole directory.
[[nodiscard]] std::size_t first_holder(const std::vector<PlaneEntry>& planes,
                                       std::size_t layer) noexcept;

/// Checks that every plane without bytes follows one of its group, and that groups shrink.
/// @param planes  of a whole directory: a part may end inside a group, which need not shrink so
/// far.
/// @throws CorruptRecord.
void check_groups(const std::vector<PlaneEntry>& planes);

/// The group that `plane` holds the bytes of, by the calibration.
/// @throws CorruptRecord when the calibration has none that begins there.
[[nodiscard]] GroupShape group_shape(const Calibration& calibration,
                                     std::size_t plane,
                                     const PlaneShape& shape);

}  // namespace kv
