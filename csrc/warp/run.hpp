// SPDX-License-Identifier: Apache-2.0
// Runs a plan for decoding or encoding: on a GPU, or in lock step on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "core/device.hpp"
#include "warp/encode_plan.hpp"
#include "warp/plan.hpp"

namespace kv::warp {

/// Runs a sealed plan whose targets are host memory, one lane after the other: slow, and meant for
/// comparing. @return the zeroed part of the workspace, for DecodePlan::faults.
[[nodiscard]] std::vector<std::uint8_t> run_in_lockstep(const DecodePlan& plan);

/// Queues the uploads of a sealed plan on `stream` and returns; plan, records and workspace must
/// stay until the stream has passed them.
/// @param workspace  device memory of at least workspace_nbytes(), at a multiple of 16.
/// @throws ShapeError, IoError; ConfigError in a build without CUDA.
void upload(const DecodePlan& plan, device::DeviceBytes workspace, device::Stream stream);

/// Queues the kernels on `stream`, behind the uploads; may be repeated. The first zeroed_nbytes()
/// of the workspace are for DecodePlan::faults then. Targets must stay until the stream has passed
/// them.
/// @throws as upload.
void launch(const DecodePlan& plan, device::DeviceBytes workspace, device::Stream stream);

/// Runs a sealed plan whose sources are host memory, one lane after the other: slow, and meant for
/// comparing. @return the workspace.
[[nodiscard]] std::vector<std::uint8_t> run_in_lockstep(const EncodePlan& plan);

/// Queues the upload of a sealed plan's tables and its kernels on `stream` and returns; plan,
/// sources and workspace must stay until the stream has passed them.
/// @param workspace  device memory of at least workspace_nbytes(), at a multiple of 16.
/// @throws ShapeError, IoError; ConfigError in a build without CUDA.
void launch(const EncodePlan& plan, device::DeviceBytes workspace, device::Stream stream);

}  // namespace kv::warp
