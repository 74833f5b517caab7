// SPDX-License-Identifier: Apache-2.0
// A warp without a GPU: 32 lanes in turn, and every access checked, so that what the kernel does to
// memory is tested where there is none.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "core/span.hpp"
#include "warp/jobs.hpp"

namespace kv::warp {

/// Not thread-safe.
class LockstepWarp {
 public:
  template <typename T>
  class PerLane {
   public:
    [[nodiscard]] T& operator[](std::uint32_t lane) { return values_.at(lane); }

   private:
    std::array<T, kLanes> values_{};
  };

  /// @param frozen  where the frozen tables lie.
  LockstepWarp(Bytes workspace, std::uint64_t frozen) : workspace_(workspace), frozen_(frozen) {}

  /// Every second time from the last lane to the first: lanes that see each other's writes show.
  template <typename Body>
  void each(const Body& body) {
    is_backwards_ = !is_backwards_;
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      body(is_backwards_ ? static_cast<std::uint32_t>(kLanes) - 1 - lane : lane);
    }
  }

  [[nodiscard]] std::uint32_t ballot(PerLane<bool>& flags) const {
    std::uint32_t bits = 0;
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      bits |= (flags[lane] ? 1U : 0U) << lane;
    }
    return bits;
  }

  void sync() const {}

  template <typename T>
  [[nodiscard]] T load(std::uint64_t offset) const {
    T value;
    std::memcpy(&value, checked<T>(offset), sizeof(T));
    return value;
  }

  template <typename T>
  void store(std::uint64_t offset, const T& value) {
    std::memcpy(checked<T>(offset), &value, sizeof(T));
  }

  template <typename T>
  void put(std::uint64_t address, const T& value) {
    KV_EXPECT(address % alignof(T) == 0, ShapeError, "a write that no GPU could do");
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
  }

  template <typename T>
  [[nodiscard]] T get(std::uint64_t address) const {
    KV_EXPECT(address % alignof(T) == 0, ShapeError, "a read that no GPU could do");
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof(T));
    return value;
  }

  [[nodiscard]] std::uint32_t frozen(std::uint32_t index) const {
    return load<std::uint32_t>(frozen_ + index * sizeof(std::uint32_t));
  }
  [[nodiscard]] ReadEntry class_entry(std::uint32_t page, std::uint32_t slot) const {
    return load<ReadEntry>(frozen_ + (page * kReadPage + slot) * sizeof(ReadEntry));
  }
  [[nodiscard]] std::uint32_t exp2_bits(std::uint32_t index) const {
    return load<std::uint32_t>(frozen_ + (kClassWords + index) * sizeof(std::uint32_t));
  }

  [[nodiscard]] std::int16_t* row_scales() { return row_scales_.data(); }

 private:
  template <typename T>
  [[nodiscard]] std::uint8_t* checked(std::uint64_t offset) const {
    KV_EXPECT(fits(offset, sizeof(T), workspace_.size()) && offset % alignof(T) == 0, ShapeError,
              "an access at " + std::to_string(offset) + " that no GPU may do");
    return workspace_.data() + offset;
  }

  Bytes workspace_;
  std::uint64_t frozen_;
  bool is_backwards_ = false;
  std::array<std::int16_t, kMaxSegmentRows> row_scales_{};
};

}  // namespace kv::warp
