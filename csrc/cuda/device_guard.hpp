// SPDX-License-Identifier: Apache-2.0
// The current device while work is queued.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/check.hpp"

namespace kv::device {

/// Makes the device that owns an address current, and restores the caller's on destruction.
class DeviceGuard {
 public:
  /// @throws ShapeError that names `what` when the address is not on a device.
  DeviceGuard(const void* address_dev, const char* what) {
    cudaPointerAttributes attributes{};
    KV_CUDA(cudaPointerGetAttributes(&attributes, address_dev),
            std::string("look up the device of ") + what);
    KV_EXPECT(attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged,
              ShapeError, std::string(what) + " is not device memory");
    KV_CUDA(cudaGetDevice(&before_), "ask for the current device");
    KV_CUDA(cudaSetDevice(attributes.device), std::string("select the device of ") + what);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  DeviceGuard(DeviceGuard&&) = delete;
  DeviceGuard& operator=(DeviceGuard&&) = delete;
  ~DeviceGuard() { static_cast<void>(cudaSetDevice(before_)); }

 private:
  int before_ = 0;
};

}  // namespace kv::device
