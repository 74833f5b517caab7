// SPDX-License-Identifier: Apache-2.0
// The warps of warp/decode.hpp on a GPU: 32 threads a segment, several segments a block.
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device_guard.hpp"
#include "cuda/gpu_warp.hpp"
#include "warp/decode.hpp"
#include "warp/run.hpp"

namespace kv::warp {
namespace {

constexpr unsigned kWarps = 16;
constexpr unsigned kThreads = kWarps * kLanes;

/// Shared memory of a block: the frozen tables, then each warp's scales; quantised jobs only.
constexpr std::size_t kSharedNbytes =
    kFrozenWords * sizeof(std::uint32_t) + kWarps * kMaxSegmentRows * sizeof(std::int16_t);

/// Decodes all jobs of a kind, one warp each.
///
/// Grid: as many blocks as fit the device at once, no more than jobs. A warp's first job follows
/// from its place, so that few jobs spread over all multiprocessors; further ones come from the
/// queue. Reads each stored byte and writes each element once. Shared: kSharedNbytes for quantised
/// jobs. Needs: a workspace as DecodePlan lays it out. Stream: the caller's, no sync.
template <JobKind kind>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(std::uint8_t* workspace_dev, const __grid_constant__ Batch batch) {
  extern __shared__ std::uint32_t shared[];
  const std::uint32_t in_block = threadIdx.x / kLanes;
  std::int16_t* scales = nullptr;
  if constexpr (kind == JobKind::kQuantised) {
    const auto* frozen = reinterpret_cast<const std::uint32_t*>(workspace_dev + batch.frozen);
    for (std::uint32_t word = threadIdx.x; word < kFrozenWords; word += kThreads) {
      shared[word] = frozen[word];
    }
    __syncthreads();
    scales = reinterpret_cast<std::int16_t*>(shared + kFrozenWords) + in_block * kMaxSegmentRows;
  }
  GpuWarp warp(workspace_dev, shared, scales);
  constexpr auto kNumber = static_cast<std::uint32_t>(kind);
  const std::uint32_t count = batch.first[kNumber + 1] - batch.first[kNumber];
  auto* queue = reinterpret_cast<std::uint32_t*>(workspace_dev + batch.queues) + kNumber;
  for (std::uint32_t at = in_block * gridDim.x + blockIdx.x; at < count;) {
    run_job<kind>(warp, batch, batch.first[kNumber] + at);
    std::uint32_t taken = 0;
    if (threadIdx.x % kLanes == 0) {
      taken = atomicAdd(queue, 1U);
    }
    at = gridDim.x * kWarps + __shfl_sync(kAllLanes, taken, 0);
  }
}

template <JobKind kind>
void launch_kind(std::uint8_t* workspace_dev, const Batch& batch, cudaStream_t queue) {
  constexpr auto kNumber = static_cast<std::uint32_t>(kind);
  const std::uint32_t count = batch.first[kNumber + 1] - batch.first[kNumber];
  if (count == 0) {
    return;
  }
  constexpr std::size_t kShared = kind == JobKind::kQuantised ? kSharedNbytes : 0;
  if constexpr (kShared > 0) {
    KV_CUDA(cudaFuncSetAttribute(decode_kernel<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kShared)),
            "ask for the shared memory of the decoder");
  }
  int device = 0;
  int multiprocessors = 0;
  int blocks = 0;
  KV_CUDA(cudaGetDevice(&device), "ask for the current device");
  KV_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "ask for the device's size");
  KV_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, decode_kernel<kind>,
                                                        static_cast<int>(kThreads), kShared),
          "ask how many decoders fit the device");
  KV_EXPECT(blocks > 0, ConfigError, "the decoder needs more shared memory than the device has");
  const auto grid = std::min(count, static_cast<std::uint32_t>(multiprocessors * blocks));
  decode_kernel<kind><<<grid, kThreads, kShared, queue>>>(workspace_dev, batch);
  KV_CUDA(cudaGetLastError(), "launch the decoder");
}

}  // namespace

void upload(const DecodePlan& plan, device::DeviceBytes workspace, device::Stream stream) {
  const cudaStream_t queue = device::checked_stream(stream);
  std::uint8_t* workspace_dev = checked_workspace(plan.workspace_nbytes(), workspace);
  const device::DeviceGuard guard(workspace_dev, "the workspace");
  for (const Upload& each : plan.uploads()) {
    KV_CUDA(cudaMemcpyAsync(workspace_dev + each.offset, each.host.data(), each.host.size(),
                            cudaMemcpyHostToDevice, queue),
            "queue a copy to the device");
  }
}

void launch(const DecodePlan& plan, device::DeviceBytes workspace, device::Stream stream) {
  const cudaStream_t queue = device::checked_stream(stream);
  std::uint8_t* workspace_dev = checked_workspace(plan.workspace_nbytes(), workspace);
  const device::DeviceGuard guard(workspace_dev, "the workspace");
  KV_CUDA(cudaMemsetAsync(workspace_dev, 0, plan.zeroed_nbytes(), queue), "clear the statuses");
  launch_kind<JobKind::kExponent>(workspace_dev, plan.batch(), queue);
  launch_kind<JobKind::kQuantised>(workspace_dev, plan.batch(), queue);
  launch_kind<JobKind::kCopy>(workspace_dev, plan.batch(), queue);
}

}  // namespace kv::warp
