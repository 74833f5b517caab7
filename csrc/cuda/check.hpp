// SPDX-License-Identifier: Apache-2.0
// The check macro for calls of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/device.hpp"
#include "core/error.hpp"

namespace kv::device {

/// The runtime's handle of `stream`. @throws ShapeError for the legacy default stream, which waits
/// for all others.
[[nodiscard]] inline cudaStream_t checked_stream(Stream stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream.handle);
  KV_EXPECT(queue != nullptr && queue != cudaStreamLegacy, ShapeError,
            "the default stream waits for all others: pass a stream of your own");
  return queue;
}

}  // namespace kv::device

/// CUDA runtime call: throws IoError that names the call's purpose and CUDA's own text.
#define KV_CUDA(call, message)                                                                 \
  do {                                                                                         \
    const cudaError_t kv_status = (call);                                                      \
    if (kv_status != cudaSuccess) {                                                            \
      throw ::kv::IoError(                                                                     \
          ::kv::located(std::string(message) + ": " + cudaGetErrorString(kv_status), __FILE__, \
                        __LINE__),                                                             \
          0);                                                                                  \
    }                                                                                          \
  } while (false)
