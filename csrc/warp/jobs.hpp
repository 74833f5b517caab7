// SPDX-License-Identifier: Apache-2.0
// What a warp is told: plain numbers, checked when the plan is made. The same bytes drive the CUDA
// kernel and its emulation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "planes/plane.hpp"

namespace kv::warp {

/// One plane of one record. Offsets count from the start of the workspace.
struct PlaneJob {
  std::uint64_t target;       ///< address of slot 0, head 0, row 0
  std::uint64_t head_stride;  ///< bytes, like the next two
  std::uint64_t row_stride;
  std::uint64_t page_stride;
  std::uint64_t page_table;   ///< i32, the slot of each page
  std::uint64_t lows;         ///< exponent: low bytes; quantised: low bits
  std::uint64_t choices;      ///< exponent, several tables: u4, the table of each channel
  std::uint64_t read_pages;   ///< exponent: [tables, 1024] read entries
  std::uint64_t channels;     ///< quantised: ChannelJob [heads, dim]
  std::uint64_t scale_bases;  ///< quantised, steps per token: i16 [heads]
  std::uint64_t scales;       ///< quantised, stored scales: u8 [heads, coded tokens]
  std::uint32_t page_tokens;
  std::uint32_t first_row;  ///< where in the first page the block's first token goes
  std::uint32_t heads;
  std::uint32_t dim;
  std::uint32_t tokens;  ///< coded ones
  std::uint32_t raw_rows;
  DType dtype;
  std::uint8_t low_bits;
  std::uint8_t scale_class;
  std::uint8_t has_choices;
  std::uint8_t has_row_scales;
  std::uint8_t has_mean;
  std::uint8_t has_dpcm;
  std::uint8_t has_pairs;  ///< the target may be written two elements at a time
};

/// What a quantised plane's channel takes: FORMAT.md sections 6.2 and 6.3.
struct alignas(8) ChannelJob {
  std::uint16_t mean;  ///< bits of bfloat16
  std::int16_t code;   ///< the step's, without the scale of the row
  std::uint8_t rho;
  std::uint8_t first_class;  ///< in the first token of a segment
  std::uint8_t rest_class;
  std::uint8_t unused;
};

/// One segment, or rows that are copied as they are.
struct SegmentJob {
  std::uint64_t stored;   ///< states and what follows; of a copy: the rows of all heads
  std::uint64_t rebuilt;  ///< dpcm: float [heads of the segment, padded dim], scratch
  std::uint32_t plane;
  std::uint32_t num_words;  ///< of a copy: rows of a head in `stored`
  std::uint32_t num_exceptions;
  std::uint16_t first_head;
  std::uint16_t num_heads;
  std::uint16_t first_token;  ///< coded one; of a copy: token of the block
  std::uint16_t num_tokens;
};

enum class JobKind : std::uint32_t { kExponent = 0, kQuantised = 1, kCopy = 2 };
constexpr std::uint32_t kNumKinds = 3;

/// Where in the workspace the jobs lie: those of a kind one after the other.
struct Batch {
  std::uint64_t statuses;  ///< u32 a job, zeros at the start
  std::uint64_t queues;    ///< u32 a kind, zeros at the start: jobs that have been taken
  std::uint64_t planes;
  std::uint64_t segments;
  std::uint64_t frozen;                ///< u32 [kFrozenWords], when there are quantised jobs
  std::uint32_t first[kNumKinds + 1];  ///< jobs of kind k are [first[k], first[k + 1])
};

enum class Status : std::uint32_t {
  kNotRun = 0,
  kDone = 1,
  kUneven = 2,     ///< states or words do not come out even
  kMisplaced = 3,  ///< an exception is out of place
};

/// The tables of all quantised planes: read entries of the sixteen classes, then EXP2.
constexpr std::uint32_t kClassWords = kNumClasses * kReadPage;
constexpr std::uint32_t kFrozenWords = kClassWords + 8;

/// Rows of a segment whose scales a warp keeps: section 4.1 allows no more.
constexpr std::uint32_t kMaxSegmentRows = kMaxSegmentSymbols / kGroup;

static_assert(std::is_trivially_copyable_v<PlaneJob> && sizeof(PlaneJob) % 8 == 0);
static_assert(std::is_trivially_copyable_v<SegmentJob> && sizeof(SegmentJob) % 8 == 0);
static_assert(sizeof(ChannelJob) == 8);

}  // namespace kv::warp
