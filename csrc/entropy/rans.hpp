// SPDX-License-Identifier: Apache-2.0
// The entropy coder: 32 interleaved rANS states (FORMAT.md section 4.3), in groups of 64 entries.
//
// Reads are memory-safe on any bytes; whether a segment was intact is known when it has been
// finished.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/span.hpp"
#include "entropy/classes.hpp"

namespace kv {

constexpr std::size_t kLanes = 32;
constexpr std::size_t kGroup = 2 * kLanes;
constexpr std::size_t kStatesNbytes = kLanes * sizeof(std::uint32_t);
constexpr std::uint32_t kStateFloor = 1U << 16;
/// Segments read in lock step.
constexpr std::size_t kMaxReaders = 4;

/// One segment that is being read.
class RansReader {
 public:
  /// `states` has kStatesNbytes; `words` is two bytes each, at any alignment. Both outlive the
  /// reader.
  void open(ConstBytes states, ConstBytes words) noexcept;

  /// True when every word was used, none beyond, and every state is back at its floor.
  [[nodiscard]] bool is_finished() const noexcept;

  // What the loops work on: states, the next word, and the last place from where a whole group may
  // be read without looking at the end.
  alignas(64) std::array<std::uint32_t, kLanes> states;
  const std::uint8_t* next;
  const std::uint8_t* limit;

  /// To be called when next > limit, before a group is read: moves the rest to where reading on is
  /// safe, or notes that the words are used up.
  void refill() noexcept;

 private:
  static constexpr std::size_t kGuardNbytes = 2 * kGroup + 64;
  const std::uint8_t* end_;
  bool is_moved_;
  bool is_failed_;
  std::array<std::uint8_t, 2 * kGuardNbytes> rest_;
};

/// One segment of a lock-step read: `bases` and `symbols` are as the rows of read_groups say.
struct ReadJob {
  RansReader* reader;
  const ReadEntry* table;
  const std::uint32_t* bases;
  std::uint8_t* symbols;
};

/// Reads `rows` rows of `groups` groups from each of 1 to kMaxReaders segments.
///
/// bases: [groups, 2, 32], where in `table` the page of a lane begins in step p; the same for every
/// row. symbols: [rows, groups, 64], in the order of the entries.
void read_groups(const ReadJob* jobs,
                 std::size_t num_jobs,
                 std::size_t rows,
                 std::size_t groups) noexcept;

/// One segment that is being written, last group first.
class RansWriter {
 public:
  /// Bytes of the room that words may not reach: loops write whole vectors.
  static constexpr std::size_t kSpareNbytes = 16;

  /// Words are written downwards from the end of `room`.
  explicit RansWriter(Bytes room) noexcept;

  /// Writes `rows` rows of `groups` groups, last to first.
  ///
  /// symbols: as in read_groups. bases: [groups, 2, 32], where in `table` the page of a lane
  /// begins; a symbol's entry is at its base + (symbol & symbol_mask). Room for one word a symbol
  /// is needed, and kSpareNbytes more.
  void write_groups(const std::uint8_t* symbols,
                    const WriteEntry* table,
                    const std::uint32_t* bases,
                    std::uint8_t symbol_mask,
                    std::size_t rows,
                    std::size_t groups) noexcept;

  [[nodiscard]] ConstBytes words() const noexcept {
    return ConstBytes(next_, static_cast<std::size_t>(end_ - next_));
  }
  [[nodiscard]] const std::array<std::uint32_t, kLanes>& states() const noexcept { return states_; }

 private:
  alignas(64) std::array<std::uint32_t, kLanes> states_;
  std::uint8_t* next_;
  std::uint8_t* end_;
};

}  // namespace kv
