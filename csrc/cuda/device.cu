// SPDX-License-Identifier: Apache-2.0
// The CUDA side of core/device.hpp: devices and pinning. Copies stand in copies.cu, rows in
// paged.cu.
#include "core/device.hpp"
#include "cuda/check.hpp"

namespace kv::device {
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
  KV_CUDA(cudaHostRegister(memory.data(), memory.size(),
                           cudaHostRegisterPortable | cudaHostRegisterMapped),
          "page-lock " + std::to_string(memory.size()) + " bytes of host memory");
}

void unpin(Bytes memory) noexcept {
  // Refused only after the driver has shut down, and then nothing is locked any more.
  static_cast<void>(cudaHostUnregister(memory.data()));
}

}  // namespace kv::device
