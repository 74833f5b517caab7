// SPDX-License-Identifier: Apache-2.0
// One segment's 32 rANS states on the way back, a lane each (FORMAT.md section 4.3).
#pragma once

#include <cstdint>

#include "warp/encode_jobs.hpp"
#include "warp/segment_reader.hpp"

namespace kv::warp {

/// The write entry of an entry that stands for nothing: it changes no state.
constexpr WriteEntry kNullWrite = kProbabilityTotal;

template <typename Warp>
class SegmentWriter {
 public:
  template <typename T>
  using PerLane = typename Warp::template PerLane<T>;

  /// Words are written downwards from the end of their room, which has one for every entry.
  KV_WARP SegmentWriter(Warp& warp, const EncodeSegmentJob& segment)
      : warp_(warp), words_(segment.words), next_(segment.most_words) {
    warp_.each([&](std::uint32_t lane) { states_[lane] = kStateFloor; });
  }

  /// Writes one symbol a lane, the last ones of a segment first; `entry_of(lane)` looks it up.
  template <typename EntryOf>
  KV_WARP void step(const EntryOf& entry_of) {
    PerLane<WriteEntry> entries;
    PerLane<bool> emits;
    warp_.each([&](std::uint32_t lane) {
      entries[lane] = entry_of(lane);
      emits[lane] = states_[lane] >= std::uint64_t{entries[lane] & 0xFFFFU} << 22;
    });
    const std::uint32_t emitting = warp_.ballot(emits);
    next_ -= count_bits(emitting);
    warp_.each([&](std::uint32_t lane) {
      std::uint32_t state = states_[lane];
      if (emits[lane]) {
        const std::uint32_t before = count_bits(emitting & ((1U << lane) - 1));
        warp_.store(words_ + 2 * (std::uint64_t{next_} + before),
                    static_cast<std::uint16_t>(state));
        state >>= 16;
      }
      const std::uint32_t frequency = entries[lane] & 0xFFFFU;
      states_[lane] =
          (state / frequency << kProbabilityBits) + state % frequency + (entries[lane] >> 16);
    });
  }

  /// Writes the states. @return the first word's place in its room.
  KV_WARP std::uint32_t finish(std::uint64_t states) {
    warp_.each(
        [&](std::uint32_t lane) { warp_.store(states + 4 * std::uint64_t{lane}, states_[lane]); });
    return next_;
  }

 private:
  Warp& warp_;
  std::uint64_t words_;
  std::uint32_t next_;
  PerLane<std::uint32_t> states_;
};

}  // namespace kv::warp
