// SPDX-License-Identifier: Apache-2.0
// Segments to elements, one warp a segment (FORMAT.md sections 5 and 6.5); lane j holds entries 2j
// and 2j + 1 of a group. segment_reader.hpp says what a Warp is.
//
// Memory-safe on any words: whatever addresses are made of was checked when the plan was made.
#pragma once

#include <cstdint>

#include "elements/elements.hpp"
#include "warp/rows.hpp"
#include "warp/segment_reader.hpp"

namespace kv::warp {

/// Writes elements i and i + 1 of a row, as far as the row goes.
template <typename Bits, typename Warp>
KV_WARP void put_pair(
    Warp& warp, const PlaneJob& plane, std::uint64_t row, std::uint32_t i, Pair<Bits> pair) {
  const std::uint64_t address = row + i * sizeof(Bits);
  if (i + 1 < plane.dim && plane.has_pairs != 0) {
    warp.put(address, pair);
    return;
  }
  if (i < plane.dim) {
    warp.put(address, pair.first);
  }
  if (i + 1 < plane.dim) {
    warp.put(address + sizeof(Bits), pair.second);
  }
}

/// Copies rows as they are.
template <typename Bits, typename Warp>
KV_WARP Status copy_rows(Warp& warp, const PlaneJob& plane, const SegmentJob& job) {
  for (std::uint32_t at = 0; at < job.num_heads; ++at) {
    const std::uint32_t head = job.first_head + at;
    for (std::uint32_t token = job.first_token; token < job.first_token + job.num_tokens; ++token) {
      const std::uint64_t row = row_address(warp, plane, head, token);
      const std::uint64_t source =
          job.stored + (std::uint64_t{head} * job.num_words + token) * plane.dim * sizeof(Bits);
      warp.each([&](std::uint32_t lane) {
        for (std::uint32_t i = 2 * lane; i < plane.dim; i += kGroup) {
          const std::uint64_t from = source + i * sizeof(Bits);
          const Bits first = warp.template load<Bits>(from);
          const Bits second =
              i + 1 < plane.dim ? warp.template load<Bits>(from + sizeof(Bits)) : Bits{0};
          put_pair(warp, plane, row, i, Pair<Bits>{first, second});
        }
      });
    }
  }
  return Status::kDone;
}

template <typename Bits, typename Warp>
class ExponentDecoder {
 public:
  KV_WARP ExponentDecoder(Warp& warp, const PlaneJob& plane) : warp_(warp), plane_(plane) {}

  KV_WARP Status decode(const SegmentJob& segment) {
    SegmentReader<Warp> reader(warp_, segment);
    for (std::uint32_t row = 0; row < segment.num_tokens; ++row) {
      for (std::uint32_t at = 0; at < segment.num_heads; ++at) {
        decode_row(reader, segment.first_head + at, segment.first_token + row);
      }
    }
    return reader.is_finished() ? Status::kDone : Status::kUneven;
  }

 private:
  using Symbols = typename Warp::template PerLane<std::uint32_t>;

  KV_WARP void decode_row(SegmentReader<Warp>& reader, std::uint32_t head, std::uint32_t token) {
    const std::uint64_t row = row_address(warp_, plane_, head, token);
    const std::uint64_t element =
        (std::uint64_t{head} * plane_.tokens + token) * plane_.dim;  // in the plane
    const std::uint64_t channel = std::uint64_t{head} * plane_.dim;
    for (std::uint32_t group = 0; group < plane_.dim; group += kGroup) {
      Symbols first;
      Symbols second;
      step(reader, channel, group, first);
      step(reader, channel, group + 1, second);
      warp_.each([&](std::uint32_t lane) {
        const std::uint32_t i = group + 2 * lane;
        if (i < plane_.dim) {
          const Bits one = merge(first[lane], element + i);
          const Bits two = i + 1 < plane_.dim ? merge(second[lane], element + i + 1) : Bits{0};
          put_pair(warp_, plane_, row, i, Pair<Bits>{one, two});
        }
      });
    }
  }

  KV_WARP void step(SegmentReader<Warp>& reader,
                    std::uint64_t channel,
                    std::uint32_t first,
                    Symbols& symbols) {
    reader.step(
        [&](std::uint32_t lane, std::uint32_t slot) {
          const std::uint32_t i = first + 2 * lane;
          if (i >= plane_.dim) {
            return null_entry(slot);
          }
          const std::uint64_t page = std::uint64_t{table_of(channel + i)} * kReadPage;
          return warp_.template load<ReadEntry>(plane_.read_pages +
                                                (page + slot) * sizeof(ReadEntry));
        },
        symbols);
  }

  [[nodiscard]] KV_WARP std::uint32_t table_of(std::uint64_t channel) const {
    if (plane_.has_choices == 0) {
      return 0;
    }
    const std::uint32_t both = warp_.template load<std::uint8_t>(plane_.choices + channel / 2);
    return both >> (channel % 2 * 4) & 0xFU;
  }

  /// Puts low bytes below the symbol, and turns the sign back to the top.
  [[nodiscard]] KV_WARP Bits merge(std::uint32_t symbol, std::uint64_t element) const {
    constexpr std::uint32_t kLows = sizeof(Bits) - 1;
    const std::uint64_t count = std::uint64_t{plane_.heads} * plane_.tokens * plane_.dim;
    std::uint32_t rotated = symbol << (8 * kLows);
    for (std::uint32_t stream = 0; stream < kLows; ++stream) {
      const std::uint32_t low =
          warp_.template load<std::uint8_t>(plane_.lows + stream * count + element);
      rotated |= low << (8 * stream);
    }
    return static_cast<Bits>(rotated >> 1 | rotated << (8 * sizeof(Bits) - 1));
  }

  Warp& warp_;
  const PlaneJob& plane_;
};

template <typename Type, typename Warp>
class QuantisedDecoder {
 public:
  using Bits = typename Type::Bits;

  KV_WARP QuantisedDecoder(Warp& warp, const PlaneJob& plane, const SegmentJob& segment)
      : warp_(warp), plane_(plane), segment_(segment), scales_(warp.row_scales()) {}

  KV_WARP Status decode() {
    SegmentReader<Warp> reader(warp_, segment_);
    if (plane_.has_row_scales != 0) {
      read_scales(reader);
    }
    for (std::uint32_t row = 0; row < segment_.num_tokens; ++row) {
      for (std::uint32_t at = 0; at < segment_.num_heads; ++at) {
        decode_row(reader, at, row);
      }
    }
    if (!reader.is_finished()) {
      return Status::kUneven;
    }
    return apply_exceptions() ? Status::kDone : Status::kMisplaced;
  }

 private:
  using Symbols = typename Warp::template PerLane<std::uint32_t>;

  /// Scales of all rows, [head][token].
  KV_WARP void read_scales(SegmentReader<Warp>& reader) {
    const std::uint32_t count = std::uint32_t{segment_.num_heads} * segment_.num_tokens;
    for (std::uint32_t group = 0; group < count; group += kGroup) {
      Symbols symbols[2];
      KV_UNROLL
      for (std::uint32_t p = 0; p < 2; ++p) {
        if (plane_.scale_class != kStoredScales) {
          reader.step(
              [&](std::uint32_t lane, std::uint32_t slot) {
                return group + 2 * lane + p < count ? warp_.class_entry(plane_.scale_class, slot)
                                                    : null_entry(slot);
              },
              symbols[p]);
        }
        warp_.each([&](std::uint32_t lane) {
          const std::uint32_t at = group + 2 * lane + p;
          if (at < count) {
            const std::uint32_t head = segment_.first_head + at / segment_.num_tokens;
            const std::uint32_t token = segment_.first_token + at % segment_.num_tokens;
            const int base =
                warp_.template load<std::int16_t>(plane_.scale_bases + 2 * std::uint64_t{head});
            const int scale =
                plane_.scale_class != kStoredScales
                    ? static_cast<std::int8_t>(symbols[p][lane])
                    : warp_.template load<std::uint8_t>(
                          plane_.scales + std::uint64_t{head} * plane_.tokens + token);
            scales_[at] = static_cast<std::int16_t>(base + scale);
          }
        });
      }
    }
    warp_.sync();
  }

  KV_WARP void decode_row(SegmentReader<Warp>& reader, std::uint32_t at, std::uint32_t row) {
    const std::uint32_t head = segment_.first_head + at;
    const std::uint32_t token = segment_.first_token + row;
    const std::uint64_t target = row_address(warp_, plane_, head, plane_.raw_rows + token);
    const int scale = plane_.has_row_scales != 0 ? scales_[at * segment_.num_tokens + row] : 0;
    const std::uint32_t low_row = (plane_.dim + 7) / 8;
    const std::uint64_t lows =
        plane_.lows + (std::uint64_t{head} * plane_.tokens + token) * plane_.low_bits * low_row;
    const std::uint32_t padded = (plane_.dim + kGroup - 1) / kGroup * kGroup;
    for (std::uint32_t group = 0; group < plane_.dim; group += kGroup) {
      typename Warp::template PerLane<ChannelJob> channels[2];
      Symbols symbols[2];
      KV_UNROLL
      for (std::uint32_t p = 0; p < 2; ++p) {
        warp_.each([&](std::uint32_t lane) {
          const std::uint32_t i = group + 2 * lane + p;
          channels[p][lane] = i < plane_.dim
                                  ? warp_.template load<ChannelJob>(
                                        plane_.channels +
                                        (std::uint64_t{head} * plane_.dim + i) * sizeof(ChannelJob))
                                  : ChannelJob{};
        });
        step(reader, group + p, row == 0, channels[p], symbols[p]);
      }
      warp_.each([&](std::uint32_t lane) {
        const std::uint32_t i = group + 2 * lane;
        if (i >= plane_.dim) {
          return;
        }
        std::uint32_t low = 0;  // of i in the lowest four bits, of i + 1 in the next
        for (std::uint32_t bit = 0; bit < plane_.low_bits; ++bit) {
          const std::uint32_t byte =
              warp_.template load<std::uint8_t>(lows + std::uint64_t{bit} * low_row + i / 8);
          low |= (byte >> i % 8 & 1U) << bit | (byte >> (i % 8 + 1) & 1U) << (4 + bit);
        }
        const std::uint64_t rebuilt =
            segment_.rebuilt + (std::uint64_t{at} * padded + i) * sizeof(float);
        Pair<float> before{0.0F, 0.0F};
        if (plane_.has_dpcm != 0 && row > 0) {
          before = warp_.template load<Pair<float>>(rebuilt);
        }
        Pair<Bits> made{};
        made.first = restore(symbols[0][lane], low & 0xFU, scale, channels[0][lane], before.first);
        made.second = restore(symbols[1][lane], low >> 4, scale, channels[1][lane], before.second);
        if (plane_.has_dpcm != 0 && row + 1 < segment_.num_tokens) {
          warp_.store(rebuilt, before);
        }
        put_pair(warp_, plane_, target, i, made);
      });
    }
  }

  KV_WARP void step(SegmentReader<Warp>& reader,
                    std::uint32_t first,
                    bool is_first_token,
                    typename Warp::template PerLane<ChannelJob>& channels,
                    Symbols& symbols) {
    reader.step(
        [&](std::uint32_t lane, std::uint32_t slot) {
          if (first + 2 * lane >= plane_.dim) {
            return null_entry(slot);
          }
          const ChannelJob& channel = channels[lane];
          return warp_.class_entry(is_first_token ? channel.first_class : channel.rest_class, slot);
        },
        symbols);
  }

  /// Section 6.5; `rebuilt` is r of the token before, and then of this one.
  KV_WARP Bits restore(std::uint32_t symbol,
                       std::uint32_t low,
                       int scale,
                       const ChannelJob& channel,
                       float& rebuilt) const {
    const int quantised =
        static_cast<std::int8_t>(symbol) * (1 << plane_.low_bits) + static_cast<int>(low);
    const float rho = product(static_cast<float>(channel.rho), 0x1p-8F);
    const float predicted = plane_.has_dpcm != 0 ? product(rho, rebuilt) : 0.0F;
    rebuilt =
        sum(product(static_cast<float>(quantised), step_size(channel.code + scale)), predicted);
    return Type::store(plane_.has_mean != 0 ? sum(rebuilt, BFloat16::load(channel.mean)) : rebuilt);
  }

  [[nodiscard]] KV_WARP float step_size(int code) const {
    const int low = code < -kMaxStepCode ? -kMaxStepCode : code;
    const int clamped = low > kMaxStepCode ? kMaxStepCode : low;
    return float_from(warp_.exp2_bits(static_cast<std::uint32_t>(clamped & 7)) +
                      (static_cast<std::uint32_t>(clamped >> 3) << 23));
  }

  /// @return false when an exception is out of place; nothing is written for that one.
  KV_WARP bool apply_exceptions() {
    const std::uint64_t indices =
        segment_.stored + kStatesNbytes + 2 * std::uint64_t{segment_.num_words};
    const std::uint64_t bits = indices + 2 * std::uint64_t{segment_.num_exceptions};
    const std::uint32_t total =
        std::uint32_t{segment_.num_tokens} * segment_.num_heads * plane_.dim;
    typename Warp::template PerLane<bool> is_bad;
    warp_.each([&](std::uint32_t lane) { is_bad[lane] = false; });
    warp_.sync();  // the rows were written by other lanes
    for (std::uint32_t from = 0; from < segment_.num_exceptions; from += kLanes) {
      warp_.each([&](std::uint32_t lane) {
        const std::uint32_t at = from + lane;
        if (at >= segment_.num_exceptions) {
          return;
        }
        const std::uint32_t index = index_at(indices, at);
        if (index >= total || (at > 0 && index <= index_at(indices, at - 1))) {
          is_bad[lane] = true;
          return;
        }
        const std::uint32_t entry = index / plane_.dim;
        const std::uint32_t head = segment_.first_head + entry % segment_.num_heads;
        const std::uint32_t token =
            plane_.raw_rows + segment_.first_token + entry / segment_.num_heads;
        const std::uint64_t row = row_address(warp_, plane_, head, token);
        warp_.put(row + std::uint64_t{index % plane_.dim} * sizeof(Bits),
                  exact_bits(bits + std::uint64_t{at} * sizeof(Bits)));
      });
    }
    return warp_.ballot(is_bad) == 0;
  }

  [[nodiscard]] KV_WARP std::uint32_t index_at(std::uint64_t indices, std::uint32_t at) const {
    return warp_.template load<std::uint16_t>(indices + 2 * std::uint64_t{at});
  }

  /// Elements of four bytes are aligned to two.
  [[nodiscard]] KV_WARP Bits exact_bits(std::uint64_t offset) const {
    std::uint32_t bits = warp_.template load<std::uint16_t>(offset);
    if (sizeof(Bits) == 4) {
      bits |= std::uint32_t{warp_.template load<std::uint16_t>(offset + 2)} << 16;
    }
    return static_cast<Bits>(bits);
  }

  Warp& warp_;
  const PlaneJob& plane_;
  const SegmentJob& segment_;
  std::int16_t* scales_;
};

template <JobKind kind, typename Type, typename Warp>
KV_WARP Status run_typed(Warp& warp, const PlaneJob& plane, const SegmentJob& segment) {
  using Bits = typename Type::Bits;
  if constexpr (kind == JobKind::kExponent) {
    return ExponentDecoder<Bits, Warp>(warp, plane).decode(segment);
  } else if constexpr (kind == JobKind::kQuantised) {
    return QuantisedDecoder<Type, Warp>(warp, plane, segment).decode();
  } else {
    return copy_rows<Bits>(warp, plane, segment);
  }
}

/// Runs job `index` of the batch, which is of `kind`, and notes its status.
template <JobKind kind, typename Warp>
KV_WARP void run_job(Warp& warp, const Batch& batch, std::uint32_t index) {
  const auto segment =
      warp.template load<SegmentJob>(batch.segments + std::uint64_t{index} * sizeof(SegmentJob));
  const auto plane =
      warp.template load<PlaneJob>(batch.planes + std::uint64_t{segment.plane} * sizeof(PlaneJob));
  Status status = Status::kNotRun;
  if (kind != JobKind::kQuantised && plane.dtype != DType::kFloat32) {
    status = run_typed<kind, BFloat16>(warp, plane, segment);  // bits are all they look at
  } else if (plane.dtype == DType::kFloat32) {
    status = run_typed<kind, Float32>(warp, plane, segment);
  } else if (plane.dtype == DType::kFloat16) {
    status = run_typed<kind, Float16>(warp, plane, segment);
  } else {
    status = run_typed<kind, BFloat16>(warp, plane, segment);
  }
  warp.each([&](std::uint32_t lane) {
    if (lane == 0) {
      warp.store(batch.statuses + std::uint64_t{index} * sizeof(Status), status);
    }
  });
  warp.sync();  // the scales are free for the next job
}

}  // namespace kv::warp
