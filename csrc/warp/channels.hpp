// SPDX-License-Identifier: Apache-2.0
// What warps look up of a quantised plane's channels.
#pragma once

#include <vector>

#include "planes/parameters.hpp"
#include "planes/plane.hpp"
#include "warp/jobs.hpp"

namespace kv::warp {

/// [heads, dim]; of `entry` only transform, mult and low bits count.
/// @param parameters  null when the transform has no source.
[[nodiscard]] std::vector<ChannelJob> channel_jobs(const PlaneShape& shape,
                                                   const PlaneEntry& entry,
                                                   const PlaneParameters* parameters);

}  // namespace kv::warp
