// SPDX-License-Identifier: Apache-2.0
// The CUDA side of core/device.hpp: pinning and queued copies. The kernel stands in paged.cu.
#include "core/device.hpp"
#include "cuda/check.hpp"

namespace kv::device {
namespace {

void check_runs(const std::vector<CopyRun>& runs,
                std::uint64_t host_nbytes,
                std::uint64_t device_nbytes) {
  for (const CopyRun& run : runs) {
    KV_EXPECT(fits(run.host_offset, run.nbytes, host_nbytes) &&
                  fits(run.device_offset, run.nbytes, device_nbytes),
              ShapeError,
              "copy of " + std::to_string(run.nbytes) + " bytes between host offset " +
                  std::to_string(run.host_offset) + " of " + std::to_string(host_nbytes) +
                  " and device offset " + std::to_string(run.device_offset) + " of " +
                  std::to_string(device_nbytes));
  }
}

}  // namespace

bool is_built() noexcept { return true; }

int count() noexcept {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) {
    // No driver, or none that fits: the error must not surface in the next checked call.
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return devices;
}

void pin(Bytes memory) {
  KV_CUDA(cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterPortable),
          "page-lock " + std::to_string(memory.size()) + " bytes of host memory");
}

void unpin(Bytes memory) noexcept {
  // Refused only after the driver has shut down, and then nothing is locked any more.
  static_cast<void>(cudaHostUnregister(memory.data()));
}

void copy_to_device(ConstBytes host,
                    DeviceBytes device,
                    const std::vector<CopyRun>& runs,
                    Stream stream) {
  const cudaStream_t queue = checked_stream(stream);
  check_runs(runs, host.size(), device.nbytes);
  for (const CopyRun& run : coalesce(runs)) {
    KV_CUDA(
        cudaMemcpyAsync(reinterpret_cast<void*>(device.address + run.device_offset),
                        host.data() + run.host_offset, run.nbytes, cudaMemcpyHostToDevice, queue),
        "queue a copy to the device");
  }
}

void copy_to_host(DeviceBytes device, Bytes host, const std::vector<CopyRun>& runs, Stream stream) {
  const cudaStream_t queue = checked_stream(stream);
  check_runs(runs, host.size(), device.nbytes);
  for (const CopyRun& run : coalesce(runs)) {
    KV_CUDA(cudaMemcpyAsync(host.data() + run.host_offset,
                            reinterpret_cast<const void*>(device.address + run.device_offset),
                            run.nbytes, cudaMemcpyDeviceToHost, queue),
            "queue a copy to the host");
  }
}

}  // namespace kv::device
