// SPDX-License-Identifier: Apache-2.0
// The lock-step run, and the refusal of a build without CUDA to use a device.
#include <cstring>

#include "warp/decode.hpp"
#include "warp/encode_pack.hpp"
#include "warp/lockstep.hpp"
#include "warp/run.hpp"

namespace kv::warp {
namespace {

template <JobKind kind>
void run_kind(LockstepWarp& warp, const Batch& batch) {
  const auto number = static_cast<std::uint32_t>(kind);
  for (std::uint32_t index = batch.first[number]; index < batch.first[number + 1]; ++index) {
    run_job<kind>(warp, batch, index);
  }
}

template <EncodeStage stage>
void run_stage(LockstepWarp& warp, const EncodeBatch& batch) {
  for (std::uint32_t index = 0; index < count_jobs<stage>(batch); ++index) {
    run_encode_job<stage>(warp, batch, index);
  }
}

}  // namespace

std::vector<std::uint8_t> run_in_lockstep(const EncodePlan& plan) {
  std::vector<std::uint8_t> workspace(plan.workspace_nbytes());
  const Upload tables = plan.tables();
  std::memcpy(workspace.data() + tables.offset, tables.host.data(), tables.host.size());
  LockstepWarp warp(Bytes(workspace.data(), workspace.size()), plan.batch().frozen);
  run_stage<EncodeStage::kScales>(warp, plan.batch());
  run_stage<EncodeStage::kSegments>(warp, plan.batch());
  run_stage<EncodeStage::kPack>(warp, plan.batch());
  return workspace;
}

std::vector<std::uint8_t> run_in_lockstep(const DecodePlan& plan) {
  std::vector<std::uint8_t> workspace(plan.workspace_nbytes());
  for (const Upload& upload : plan.uploads()) {
    if (upload.host.size() > 0) {
      std::memcpy(workspace.data() + upload.offset, upload.host.data(), upload.host.size());
    }
  }
  LockstepWarp warp(Bytes(workspace.data(), workspace.size()), plan.batch().frozen);
  run_kind<JobKind::kExponent>(warp, plan.batch());
  run_kind<JobKind::kQuantised>(warp, plan.batch());
  run_kind<JobKind::kCopy>(warp, plan.batch());
  workspace.resize(plan.zeroed_nbytes());
  return workspace;
}

#ifndef KV_WITH_CUDA

namespace {

[[noreturn]] void refuse(int line) {
  throw ConfigError(
      located("kvstore was built without CUDA: build with KVSTORE_CUDA=on to code on a device",
              __FILE__, line));
}

}  // namespace

void upload(const DecodePlan&, device::DeviceBytes, device::Stream) { refuse(__LINE__); }
void launch(const DecodePlan&, device::DeviceBytes, device::Stream) { refuse(__LINE__); }
void launch(const EncodePlan&, device::DeviceBytes, device::Stream) { refuse(__LINE__); }

#endif  // KV_WITH_CUDA

}  // namespace kv::warp
