// SPDX-License-Identifier: Apache-2.0
// The encoding warps of warp/encode_pack.hpp on a GPU: 32 threads a job, three kernels in a row.
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device_guard.hpp"
#include "cuda/gpu_warp.hpp"
#include "warp/encode_pack.hpp"
#include "warp/run.hpp"

namespace kv::warp {
namespace {

constexpr unsigned kWarps = 4;
constexpr unsigned kThreads = kWarps * kLanes;

/// Runs all jobs of a stage, one warp each.
///
/// Grid: a warp a job. Shared: the frozen tables, static. Needs: a workspace as EncodePlan lays it
/// out, and the stages before. Stream: the caller's, no sync.
template <EncodeStage stage>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(std::uint8_t* workspace_dev, const __grid_constant__ EncodeBatch batch) {
  __shared__ std::uint32_t shared[kEncodeWords];
  const auto* frozen = reinterpret_cast<const std::uint32_t*>(workspace_dev + batch.frozen);
  for (std::uint32_t word = threadIdx.x; word < kEncodeWords; word += kThreads) {
    shared[word] = frozen[word];
  }
  __syncthreads();
  GpuWarp warp(workspace_dev, shared, nullptr);
  const std::uint32_t index = blockIdx.x * kWarps + threadIdx.x / kLanes;
  if (index < count_jobs<stage>(batch)) {
    run_encode_job<stage>(warp, batch, index);
  }
}

template <EncodeStage stage>
void launch_stage(std::uint8_t* workspace_dev,
                  const EncodeBatch& batch,
                  std::uint32_t count,
                  cudaStream_t queue) {
  if (count > 0) {
    const std::uint32_t grid = (count - 1) / kWarps + 1;
    encode_kernel<stage><<<grid, kThreads, 0, queue>>>(workspace_dev, batch);
    KV_CUDA(cudaGetLastError(), "launch the encoder");
  }
}

}  // namespace

void launch(const EncodePlan& plan, device::DeviceBytes workspace, device::Stream stream) {
  const cudaStream_t queue = device::checked_stream(stream);
  std::uint8_t* workspace_dev = checked_workspace(plan.workspace_nbytes(), workspace);
  const device::DeviceGuard guard(workspace_dev, "the workspace");
  const EncodeBatch& batch = plan.batch();
  const Upload tables = plan.tables();
  KV_CUDA(cudaMemsetAsync(workspace_dev, 0, plan.zeroed_nbytes(), queue), "clear the results");
  KV_CUDA(cudaMemcpyAsync(workspace_dev + tables.offset, tables.host.data(), tables.host.size(),
                          cudaMemcpyHostToDevice, queue),
          "queue a copy to the device");
  launch_stage<EncodeStage::kScales>(workspace_dev, batch, batch.num_planes, queue);
  launch_stage<EncodeStage::kSegments>(workspace_dev, batch, batch.num_segments, queue);
  launch_stage<EncodeStage::kPack>(workspace_dev, batch, batch.num_segments, queue);
}

}  // namespace kv::warp
