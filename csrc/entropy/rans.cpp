// SPDX-License-Identifier: Apache-2.0
// The coder in plain loops: what the loops for newer CPUs are tested against.
#include "entropy/rans.hpp"

#include <algorithm>
#include <cstring>

#include "core/endian.hpp"
#include "entropy/rans_simd.hpp"

namespace kv {
namespace {

constexpr std::uint32_t kSlotMask = kProbabilityTotal - 1;

void read_step(RansReader& reader,
               const ReadEntry* table,
               const std::uint32_t* bases,
               std::uint8_t* symbols) noexcept {
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t state = reader.states[lane];
    const ReadEntry entry = table[bases[lane] + (state & kSlotMask)];
    std::uint32_t moved =
        (entry & kFrequencyMask) * (state >> kProbabilityBits) + (entry >> kBiasShift);
    if (moved < kStateFloor) {
      moved = moved << 16 | load_le<std::uint16_t>(reader.next);
      reader.next += 2;
    }
    reader.states[lane] = moved;
    symbols[2 * lane] = static_cast<std::uint8_t>(entry >> kSymbolShift);
  }
}

void read_groups_plain(const ReadJob* jobs,
                       std::size_t num_jobs,
                       std::size_t rows,
                       std::size_t groups) noexcept {
  for (std::size_t job = 0; job < num_jobs; ++job) {
    RansReader& reader = *jobs[job].reader;
    std::uint8_t* symbols = jobs[job].symbols;
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t group = 0; group < groups; ++group, symbols += kGroup) {
        if (reader.next > reader.limit) {
          reader.refill();
        }
        const std::uint32_t* bases = jobs[job].bases + group * kGroup;
        read_step(reader, jobs[job].table, bases, symbols);
        read_step(reader, jobs[job].table, bases + kLanes, symbols + 1);
      }
    }
  }
}

}  // namespace

void RansReader::open(ConstBytes states_in, ConstBytes words) noexcept {
  std::memcpy(states.data(), states_in.data(), kStatesNbytes);
  next = words.data();
  end_ = words.data() + words.size();
  is_moved_ = false;
  is_failed_ = std::any_of(states.begin(), states.end(),
                           [](std::uint32_t state) { return state < kStateFloor; });
  if (words.size() >= kGuardNbytes) {
    limit = end_ - kGuardNbytes;
  } else {
    refill();
  }
}

void RansReader::refill() noexcept {
  if (!is_moved_) {
    // At least the guard is missing: what is left fits, with a whole group of zeros behind it.
    const auto left = static_cast<std::size_t>(end_ - next);
    std::memcpy(rest_.data(), next, left);
    std::memset(rest_.data() + left, 0, rest_.size() - left);
    next = rest_.data();
    end_ = limit = next + left;
    is_moved_ = true;
    return;
  }
  is_failed_ = true;
  next = limit = end_ = rest_.data();
}

bool RansReader::is_finished() const noexcept {
  const bool is_at_floor = std::all_of(states.begin(), states.end(),
                                       [](std::uint32_t state) { return state == kStateFloor; });
  return is_at_floor && !is_failed_ && next == end_;
}

void read_groups(const ReadJob* jobs,
                 std::size_t num_jobs,
                 std::size_t rows,
                 std::size_t groups) noexcept {
#ifdef KV_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      read_groups_avx512(jobs, num_jobs, rows, groups);
      return;
    case SimdLevel::kAvx2:
      read_groups_avx2(jobs, num_jobs, rows, groups);
      return;
    case SimdLevel::kBaseline:
      break;
  }
#endif
  read_groups_plain(jobs, num_jobs, rows, groups);
}

RansWriter::RansWriter(Bytes room) noexcept
    : next_(room.data() + room.size()), end_(room.data() + room.size()) {
  states_.fill(kStateFloor);
}

void RansWriter::write_groups(const std::uint8_t* symbols,
                              const WriteEntry* table,
                              const std::uint32_t* bases,
                              std::uint8_t symbol_mask,
                              std::size_t rows,
                              std::size_t groups) noexcept {
#ifdef KV_X86
  if (simd_level() >= SimdLevel::kAvx2) {
    const WriteJob job{symbols, table, bases, symbol_mask, rows, groups, states_.data(), next_};
    next_ = simd_level() == SimdLevel::kAvx2 ? write_groups_avx2(job) : write_groups_avx512(job);
    return;
  }
#endif
  for (std::size_t index = rows * groups; index-- > 0;) {
    const std::uint8_t* entries = symbols + index * kGroup;
    for (std::size_t at = kGroup; at-- > 0;) {
      const std::size_t lane = at % kLanes;
      const std::uint8_t symbol = entries[2 * lane + at / kLanes];
      const WriteEntry entry = table[bases[index % groups * kGroup + at] + (symbol & symbol_mask)];
      const std::uint32_t frequency = entry & 0xFFFFU;
      std::uint32_t state = states_[lane];
      if (state >= std::uint64_t{frequency} << 22) {
        next_ -= 2;
        store_le<std::uint16_t>(next_, static_cast<std::uint16_t>(state));
        state >>= 16;
      }
      states_[lane] = (state / frequency << kProbabilityBits) + state % frequency + (entry >> 16);
    }
  }
}

}  // namespace kv
