// SPDX-License-Identifier: Apache-2.0
// A warp on a GPU: 32 threads, each of which is the lane that it is asked for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "core/device.hpp"
#include "warp/rows.hpp"

namespace kv::warp {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

class GpuWarp {
 public:
  template <typename T>
  class PerLane {
   public:
    KV_WARP T& operator[](std::uint32_t) { return value_; }

   private:
    T value_;
  };

  KV_WARP GpuWarp(std::uint8_t* workspace,
                  const std::uint32_t* frozen_shared,
                  std::int16_t* scales_shared)
      : workspace_(workspace), frozen_(frozen_shared), scales_(scales_shared) {}

  template <typename Body>
  KV_WARP void each(const Body& body) {
    body(threadIdx.x % kLanes);
  }
  KV_WARP std::uint32_t ballot(PerLane<bool>& flags) const {
    return __ballot_sync(kAllLanes, flags[0]);
  }
  KV_WARP void sync() const { __syncwarp(); }

  template <typename T>
  KV_WARP T load(std::uint64_t offset) const {
    return *reinterpret_cast<const T*>(workspace_ + offset);
  }
  template <typename T>
  KV_WARP void store(std::uint64_t offset, const T& value) {
    *reinterpret_cast<T*>(workspace_ + offset) = value;
  }
  template <typename T>
  KV_WARP void put(std::uint64_t address, const T& value) {
    *reinterpret_cast<T*>(address) = value;
  }

  template <typename T>
  KV_WARP T get(std::uint64_t address) const {
    return *reinterpret_cast<const T*>(address);
  }

  KV_WARP std::uint32_t frozen(std::uint32_t index) const { return frozen_[index]; }
  KV_WARP ReadEntry class_entry(std::uint32_t page, std::uint32_t slot) const {
    return frozen_[page * kReadPage + slot];
  }
  KV_WARP std::uint32_t exp2_bits(std::uint32_t index) const {
    return frozen_[kClassWords + index];
  }
  KV_WARP std::int16_t* row_scales() const { return scales_; }

 private:
  std::uint8_t* workspace_;
  const std::uint32_t* frozen_;
  std::int16_t* scales_;
};

/// @throws ShapeError when the workspace is too small or not at a multiple of 16.
[[nodiscard]] inline std::uint8_t* checked_workspace(std::uint64_t wanted_nbytes,
                                                     device::DeviceBytes workspace) {
  KV_EXPECT(workspace.nbytes >= wanted_nbytes && workspace.address % 16 == 0, ShapeError,
            "a workspace of " + std::to_string(workspace.nbytes) + " bytes at " +
                std::to_string(workspace.address) + "; wanted " + std::to_string(wanted_nbytes) +
                " at a multiple of 16");
  return reinterpret_cast<std::uint8_t*>(workspace.address);
}

}  // namespace kv::warp
