// SPDX-License-Identifier: Apache-2.0
// One segment's 32 rANS states, a lane each (FORMAT.md section 4.3).
//
// Code here and in decode.hpp is generic over a Warp: on the GPU 32 threads, elsewhere the 32 lanes
// of lockstep.hpp. A Warp has
//   PerLane<T>        one T a lane, [lane] is this lane's
//   each(body)        body(lane) for every lane; lanes may not see each other's writes until then
//   ballot(flags)     bit `lane` is flags[lane]
//   sync()            writes to memory before it are seen by all lanes after it
//   load<T>(offset), store<T>(offset, value)   of the workspace, aligned
//   put<T>(address, value)                     to a target, aligned
//   class_entry(page, slot), exp2_bits(index)  frozen tables
//   row_scales()      room for kMaxSegmentRows i16
#pragma once

#include <cstdint>

#include "entropy/rans.hpp"
#include "warp/jobs.hpp"

#ifdef __CUDACC__
#define KV_WARP __device__ __forceinline__
#define KV_UNROLL _Pragma("unroll")
#else
#define KV_WARP inline
#define KV_UNROLL
#endif

namespace kv::warp {

KV_WARP std::uint32_t count_bits(std::uint32_t bits) {
#ifdef __CUDACC__
  return static_cast<std::uint32_t>(__popc(static_cast<int>(bits)));
#else
  return static_cast<std::uint32_t>(__builtin_popcount(bits));
#endif
}

/// The read entry of an entry that stands for nothing: symbol 0 with the whole probability.
KV_WARP ReadEntry null_entry(std::uint32_t slot) { return kProbabilityTotal | slot << kBiasShift; }

template <typename Warp>
class SegmentReader {
 public:
  template <typename T>
  using PerLane = typename Warp::template PerLane<T>;

  KV_WARP SegmentReader(Warp& warp, const SegmentJob& segment)
      : warp_(warp), words_(segment.stored + kStatesNbytes), num_words_(segment.num_words) {
    PerLane<bool> is_low;
    warp_.each([&](std::uint32_t lane) {
      states_[lane] = warp_.template load<std::uint32_t>(segment.stored + 4 * lane);
      is_low[lane] = states_[lane] < kStateFloor;
    });
    is_failed_ = warp_.ballot(is_low) != 0;
  }

  /// Reads one symbol a lane; `entry_of(lane, slot)` looks it up.
  ///
  /// Beyond the last word, the last one is read again: is_finished tells.
  template <typename EntryOf>
  KV_WARP void step(const EntryOf& entry_of, PerLane<std::uint32_t>& symbols) {
    PerLane<bool> wants_word;
    warp_.each([&](std::uint32_t lane) {
      const std::uint32_t state = states_[lane];
      const ReadEntry entry = entry_of(lane, state & (kProbabilityTotal - 1));
      const std::uint32_t moved =
          (entry & kFrequencyMask) * (state >> kProbabilityBits) + (entry >> kBiasShift);
      states_[lane] = moved;
      symbols[lane] = entry >> kSymbolShift & 0xFFU;
      wants_word[lane] = moved < kStateFloor;
    });
    const std::uint32_t wanting = warp_.ballot(wants_word);
    warp_.each([&](std::uint32_t lane) {
      if (wants_word[lane]) {
        const std::uint32_t before = count_bits(wanting & ((1U << lane) - 1));
        states_[lane] = states_[lane] << 16 | word(next_ + before);
      }
    });
    next_ += count_bits(wanting);
  }

  /// True when no state was below its floor at the start, every word was used, none beyond, and
  /// every state is back at its floor.
  [[nodiscard]] KV_WARP bool is_finished() {
    PerLane<bool> is_off;
    warp_.each([&](std::uint32_t lane) { is_off[lane] = states_[lane] != kStateFloor; });
    return warp_.ballot(is_off) == 0 && !is_failed_ && next_ == num_words_;
  }

 private:
  [[nodiscard]] KV_WARP std::uint32_t word(std::uint32_t index) const {
    if (num_words_ == 0) {
      return 0;
    }
    const std::uint32_t at = index < num_words_ ? index : num_words_ - 1;
    return warp_.template load<std::uint16_t>(words_ + 2 * std::uint64_t{at});
  }

  Warp& warp_;
  std::uint64_t words_;
  std::uint32_t num_words_;
  std::uint32_t next_ = 0;
  bool is_failed_ = false;
  PerLane<std::uint32_t> states_;
};

}  // namespace kv::warp
