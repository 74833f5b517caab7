// SPDX-License-Identifier: Apache-2.0
// What encoding warps are told, and what they answer. The same bytes drive the CUDA kernels and
// their emulation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "warp/jobs.hpp"

namespace kv::warp {

/// One quantised plane to be made. Offsets count from the start of the workspace.
struct EncodePlaneJob {
  PlaneJob rows;       ///< where they come from; `scales` is i16 [heads, coded tokens], scratch
  std::uint64_t room;  ///< where the plane goes: zeros at the start
  std::uint64_t raw_nbytes;
  std::uint64_t wanted;   ///< steps per token: i32 [heads, coded tokens], scratch
  std::uint64_t spreads;  ///< steps per token: u64 [lanes, 2], scratch
  std::uint32_t first_segment;
  std::uint32_t num_segments;
  std::int32_t mult;
  float inverse_dim;
};

/// One segment to be made; everything but the numbers at the end is scratch.
struct EncodeSegmentJob {
  std::uint64_t symbols;  ///< i8 [tokens, heads, padded dim]
  std::uint64_t flags;    ///< u32 [tokens, heads, groups, 2], which channels are exceptions
  std::uint64_t states;   ///< u32 [lanes]
  std::uint64_t words;    ///< u16, filled from the end
  std::uint64_t indices;  ///< u16 [elements]
  std::uint64_t bits;     ///< [elements]
  std::uint32_t plane;
  std::uint32_t most_words;
  std::uint16_t first_head;
  std::uint16_t num_heads;
  std::uint16_t first_token;  ///< coded one
  std::uint16_t num_tokens;
};

struct EncodedPlane {
  std::uint32_t is_done;
  std::uint32_t nbytes;  ///< 0 when the plane does not shrink
  std::uint32_t scale_class;
  std::uint32_t unused;
};

struct EncodedSegment {
  std::uint32_t first_word;
  std::uint32_t num_exceptions;
};

/// Steps of the work, each to be finished before the next begins.
enum class EncodeStage : std::uint32_t {
  kScales = 0,    ///< a job is a plane
  kSegments = 1,  ///< a job is a segment
  kPack = 2,      ///< a job is a segment
};

struct EncodeBatch {
  std::uint64_t made_planes;    ///< EncodedPlane, zeros at the start
  std::uint64_t made_segments;  ///< EncodedSegment
  std::uint64_t planes;
  std::uint64_t segments;
  std::uint64_t frozen;  ///< u32 [kEncodeWords]
  std::uint32_t num_planes;
  std::uint32_t num_segments;
};

// The tables: write entries of the sixteen classes, EXP2, LOG16, RADIUS.
constexpr std::uint32_t kExp2At = kNumClasses * kClassWritePage;
constexpr std::uint32_t kLog16At = kExp2At + 8;
constexpr std::uint32_t kRadiusAt = kLog16At + 16;
constexpr std::uint32_t kEncodeWords = kRadiusAt + kNumClasses;

static_assert(std::is_trivially_copyable_v<EncodePlaneJob> && sizeof(EncodePlaneJob) % 8 == 0);
static_assert(std::is_trivially_copyable_v<EncodeSegmentJob> && sizeof(EncodeSegmentJob) % 8 == 0);

}  // namespace kv::warp
