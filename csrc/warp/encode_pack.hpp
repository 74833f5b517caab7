// SPDX-License-Identifier: Apache-2.0
// Segments to their place in the plane, one warp a segment, and which job does what in each stage.
#pragma once

#include <cstdint>

#include "warp/encode.hpp"

namespace kv::warp {

/// Puts one segment behind those before it, if the plane shrinks by that.
template <typename Warp>
class SegmentPacker {
 public:
  KV_WARP SegmentPacker(Warp& warp,
                        const EncodeBatch& batch,
                        const EncodePlaneJob& plane,
                        std::uint32_t index,
                        std::uint32_t scale_class)
      : warp_(warp),
        batch_(batch),
        plane_(plane),
        index_(index),
        itemsize_(plane.rows.dtype == DType::kFloat32 ? 4 : 2),
        sections_(sections_of(plane, scale_class)) {}

  KV_WARP void pack() {
    std::uint64_t at = sections_.segments;
    for (std::uint32_t before = plane_.first_segment; before < index_; ++before) {
      at += nbytes_of(job(before), made(before));
    }
    const EncodeSegmentJob segment = job(index_);
    const EncodedSegment found = made(index_);
    const std::uint64_t end = at + nbytes_of(segment, found);
    // A coding other than raw has to save a byte at least.
    const bool is_smaller = end - plane_.room < plane_.raw_nbytes;
    const std::uint32_t num_words = segment.most_words - found.first_word;
    if (is_smaller) {
      copy(segment.states, at, kStatesNbytes / 2);
      copy(segment.words + 2 * std::uint64_t{found.first_word}, at + kStatesNbytes, num_words);
      const std::uint64_t indices = at + kStatesNbytes + 2 * std::uint64_t{num_words};
      copy(segment.indices, indices, found.num_exceptions);
      copy(segment.bits, indices + 2 * std::uint64_t{found.num_exceptions},
           found.num_exceptions * itemsize_ / 2);
    }
    warp_.each([&](std::uint32_t lane) {
      if (lane == 0) {
        const std::uint64_t counts =
            sections_.counts + 8 * std::uint64_t{index_ - plane_.first_segment};
        warp_.store(counts, num_words);
        warp_.store(counts + 4, found.num_exceptions);
      }
    });
    if (index_ == plane_.first_segment) {
      copy_raw_rows();
    }
    if (index_ + 1 == plane_.first_segment + plane_.num_segments) {
      note_end(segment.plane, is_smaller ? end - plane_.room : 0);
    }
  }

 private:
  [[nodiscard]] KV_WARP EncodeSegmentJob job(std::uint32_t index) const {
    return warp_.template load<EncodeSegmentJob>(batch_.segments +
                                                 index * std::uint64_t{sizeof(EncodeSegmentJob)});
  }
  [[nodiscard]] KV_WARP EncodedSegment made(std::uint32_t index) const {
    return warp_.template load<EncodedSegment>(batch_.made_segments +
                                               index * std::uint64_t{sizeof(EncodedSegment)});
  }

  [[nodiscard]] KV_WARP std::uint64_t nbytes_of(const EncodeSegmentJob& segment,
                                                const EncodedSegment& found) const {
    return padded_to(kStatesNbytes + 2 * std::uint64_t{segment.most_words - found.first_word} +
                         std::uint64_t{found.num_exceptions} * (2 + itemsize_),
                     4);
  }

  KV_WARP void copy(std::uint64_t from, std::uint64_t to, std::uint32_t halves) {
    for (std::uint32_t first = 0; first < halves; first += kLanes) {
      warp_.each([&](std::uint32_t lane) {
        const std::uint64_t at = 2 * (std::uint64_t{first} + lane);
        if (first + lane < halves) {
          warp_.store(to + at, warp_.template load<std::uint16_t>(from + at));
        }
      });
    }
  }

  /// The first tokens of all heads, as they are.
  KV_WARP void copy_raw_rows() {
    const PlaneJob& rows = plane_.rows;
    const std::uint32_t halves = rows.dim * itemsize_ / 2;
    std::uint64_t to = sections_.raw;
    for (std::uint32_t head = 0; head < rows.heads; ++head) {
      for (std::uint32_t token = 0; token < rows.raw_rows; ++token, to += 2 * halves) {
        const std::uint64_t row = row_address(warp_, rows, head, token);
        for (std::uint32_t first = 0; first < halves; first += kLanes) {
          warp_.each([&](std::uint32_t lane) {
            const std::uint64_t at = 2 * (std::uint64_t{first} + lane);
            if (first + lane < halves) {
              warp_.store(to + at, warp_.template get<std::uint16_t>(row + at));
            }
          });
        }
      }
    }
  }

  KV_WARP void note_end(std::uint32_t plane, std::uint64_t nbytes) {
    warp_.each([&](std::uint32_t lane) {
      if (lane == 0) {
        const std::uint64_t to = batch_.made_planes + plane * std::uint64_t{sizeof(EncodedPlane)};
        auto found = warp_.template load<EncodedPlane>(to);
        found.is_done = 1;
        found.nbytes = static_cast<std::uint32_t>(nbytes);
        warp_.store(to, found);
      }
    });
  }

  Warp& warp_;
  const EncodeBatch& batch_;
  const EncodePlaneJob& plane_;
  std::uint32_t index_;
  std::uint32_t itemsize_;
  PlaneSections sections_;
};

template <EncodeStage stage, typename Type, typename Warp>
KV_WARP void encode_typed(Warp& warp,
                          const EncodeBatch& batch,
                          const EncodePlaneJob& plane,
                          const EncodeSegmentJob& segment,
                          std::uint32_t index) {
  const std::uint64_t made_plane =
      batch.made_planes +
      (stage == EncodeStage::kScales ? index : segment.plane) * std::uint64_t{sizeof(EncodedPlane)};
  if constexpr (stage == EncodeStage::kScales) {
    const std::uint32_t scale_class =
        plane.rows.has_row_scales != 0 ? ScaleChooser<Type, Warp>(warp, plane).choose() : 0;
    warp.each([&](std::uint32_t lane) {
      if (lane == 0) {
        warp.store(made_plane, EncodedPlane{0, 0, scale_class, 0});
      }
    });
  } else {
    const std::uint32_t scale_class = warp.template load<EncodedPlane>(made_plane).scale_class;
    if constexpr (stage == EncodeStage::kSegments) {
      const EncodedSegment made =
          SegmentEncoder<Type, Warp>(warp, plane, segment, scale_class).encode();
      warp.each([&](std::uint32_t lane) {
        if (lane == 0) {
          warp.store(batch.made_segments + index * std::uint64_t{sizeof(EncodedSegment)}, made);
        }
      });
    } else {
      SegmentPacker<Warp>(warp, batch, plane, index, scale_class).pack();
    }
  }
}

/// Runs job `index` of a stage.
template <EncodeStage stage, typename Warp>
KV_WARP void run_encode_job(Warp& warp, const EncodeBatch& batch, std::uint32_t index) {
  EncodeSegmentJob segment{};
  if constexpr (stage != EncodeStage::kScales) {
    segment = warp.template load<EncodeSegmentJob>(batch.segments +
                                                   index * std::uint64_t{sizeof(EncodeSegmentJob)});
  }
  const std::uint32_t of = stage == EncodeStage::kScales ? index : segment.plane;
  const auto plane =
      warp.template load<EncodePlaneJob>(batch.planes + of * std::uint64_t{sizeof(EncodePlaneJob)});
  if (plane.rows.dtype == DType::kFloat32) {
    encode_typed<stage, Float32>(warp, batch, plane, segment, index);
  } else if (plane.rows.dtype == DType::kFloat16) {
    encode_typed<stage, Float16>(warp, batch, plane, segment, index);
  } else {
    encode_typed<stage, BFloat16>(warp, batch, plane, segment, index);
  }
}

/// How many jobs a stage has.
template <EncodeStage stage>
KV_WARP std::uint32_t count_jobs(const EncodeBatch& batch) {
  return stage == EncodeStage::kScales ? batch.num_planes : batch.num_segments;
}

}  // namespace kv::warp
