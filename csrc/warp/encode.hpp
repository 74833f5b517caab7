// SPDX-License-Identifier: Apache-2.0
// Elements to segments, one warp a segment (FORMAT.md sections 4 and 6.6); lane j holds entries 2j
// and 2j + 1 of a group. segment_reader.hpp says what a Warp is; for encoding it also has
//   get<T>(address)  of a source, aligned
//   frozen(index)    word of the frozen tables
#pragma once

#include <cstdint>

#include "elements/elements.hpp"
#include "warp/encode_scales.hpp"
#include "warp/rows.hpp"
#include "warp/segment_writer.hpp"

namespace kv::warp {

/// Of a group.
constexpr std::uint32_t kEntries = kGroup;

KV_WARP float difference(float a, float b) {
#ifdef __CUDACC__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

/// Where the sections of a plane begin, once the class of its scales is known.
struct PlaneSections {
  std::uint64_t counts;
  std::uint64_t raw;
  std::uint64_t lows;
  std::uint64_t segments;
};

KV_WARP PlaneSections sections_of(const EncodePlaneJob& plane, std::uint32_t scale_class) {
  const PlaneJob& rows = plane.rows;
  const std::uint64_t itemsize = rows.dtype == DType::kFloat32 ? 4 : 2;
  const std::uint64_t coded = std::uint64_t{rows.heads} * rows.tokens;
  PlaneSections at{plane.room, 0, 0, 0};
  if (rows.has_row_scales != 0) {
    at.counts += padded_to(2 * std::uint64_t{rows.heads}, 4);
    at.counts += scale_class == kStoredScales ? padded_to(coded, 4) : 0;
  }
  at.raw = at.counts + 8 * std::uint64_t{plane.num_segments};
  at.lows = at.raw + padded_to(std::uint64_t{rows.heads} * rows.raw_rows * rows.dim * itemsize, 4);
  at.segments = at.lows + padded_to(coded * rows.low_bits * ((rows.dim + 7) / 8), 4);
  return at;
}

template <typename Type, typename Warp>
class SegmentEncoder {
 public:
  using Bits = typename Type::Bits;

  KV_WARP SegmentEncoder(Warp& warp,
                         const EncodePlaneJob& plane,
                         const EncodeSegmentJob& segment,
                         std::uint32_t scale_class)
      : warp_(warp),
        plane_(plane),
        rows_(plane.rows),
        segment_(segment),
        scale_class_(scale_class),
        groups_((rows_.dim + kEntries - 1) / kEntries),
        lows_(sections_of(plane, scale_class).lows) {}

  KV_WARP EncodedSegment encode() {
    for (std::uint32_t at = 0; at < segment_.num_heads; ++at) {
      for (std::uint32_t group = 0; group < groups_; ++group) {
        quantise(at, group);
      }
    }
    warp_.sync();
    const std::uint32_t exceptions = list_exceptions();
    return EncodedSegment{write_words(), exceptions};
  }

 private:
  template <typename T>
  using PerLane = typename Warp::template PerLane<T>;

  /// What one element becomes.
  struct Made {
    std::int32_t quantised;
    bool is_exception;
  };

  [[nodiscard]] KV_WARP std::uint32_t head_of(std::uint32_t at) const {
    return segment_.first_head + at;
  }

  [[nodiscard]] KV_WARP std::uint64_t source_row(std::uint32_t at, std::uint32_t row) const {
    return row_address(warp_, rows_, head_of(at), rows_.raw_rows + segment_.first_token + row);
  }

  /// Scale of a row, relative to a channel's code.
  [[nodiscard]] KV_WARP int scale_of(std::uint32_t at, std::uint32_t row) const {
    const std::uint64_t place =
        std::uint64_t{head_of(at)} * rows_.tokens + segment_.first_token + row;
    return rows_.has_row_scales != 0 ? warp_.template load<std::int16_t>(rows_.scales + 2 * place)
                                     : 0;
  }

  [[nodiscard]] KV_WARP std::uint64_t symbol_at(std::uint32_t at,
                                                std::uint32_t row,
                                                std::uint32_t i) const {
    return segment_.symbols + (std::uint64_t{row} * segment_.num_heads + at) * groups_ * kEntries +
           i;
  }

  [[nodiscard]] KV_WARP std::uint64_t channel_at(std::uint32_t at, std::uint32_t i) const {
    return rows_.channels + (std::uint64_t{head_of(at)} * rows_.dim + i) * sizeof(ChannelJob);
  }

  [[nodiscard]] KV_WARP float step_size(int code) const {
    const int low = code < -kMaxStepCode ? -kMaxStepCode : code;
    const int clamped = low > kMaxStepCode ? kMaxStepCode : low;
    return float_from(warp_.frozen(kExp2At + static_cast<std::uint32_t>(clamped & 7)) +
                      (static_cast<std::uint32_t>(clamped >> 3) << 23));
  }

  /// 64 channels of a head, token after token: what is predicted from stays in registers.
  KV_WARP void quantise(std::uint32_t at, std::uint32_t group) {
    PerLane<ChannelJob> channels[2];
    PerLane<float> rebuilt[2];
    KV_UNROLL
    for (std::uint32_t p = 0; p < 2; ++p) {
      warp_.each([&](std::uint32_t lane) {
        const std::uint32_t i = group * kEntries + 2 * lane + p;
        channels[p][lane] =
            i < rows_.dim ? warp_.template load<ChannelJob>(channel_at(at, i)) : ChannelJob{};
        rebuilt[p][lane] = 0.0F;
      });
    }
    for (std::uint32_t row = 0; row < segment_.num_tokens; ++row) {
      const std::uint64_t source = source_row(at, row);
      const int scale = scale_of(at, row);
      PerLane<bool> is_exception[2];
      PerLane<std::uint32_t> lows[2];
      warp_.each([&](std::uint32_t lane) {
        const std::uint32_t first = group * kEntries + 2 * lane;
        std::uint32_t symbols = 0;
        KV_UNROLL
        for (std::uint32_t p = 0; p < 2; ++p) {
          Made made{0, false};
          if (first + p < rows_.dim) {
            const auto bits = warp_.template get<Bits>(source + (first + p) * sizeof(Bits));
            made = quantised(bits, scale, row == 0, channels[p][lane], rebuilt[p][lane]);
          }
          is_exception[p][lane] = made.is_exception;
          lows[p][lane] = static_cast<std::uint32_t>(made.quantised) & ((1U << rows_.low_bits) - 1);
          const auto symbol = static_cast<std::uint8_t>(made.quantised >> rows_.low_bits);
          symbols |= std::uint32_t{symbol} << (8 * p);
        }
        warp_.store(symbol_at(at, row, first), static_cast<std::uint16_t>(symbols));
      });
      note_flags(at, row, group, is_exception);
      pack_lows(at, row, group, lows);
    }
  }

  /// Section 6.6; `rebuilt` is r of the token before, and then of this one.
  [[nodiscard]] KV_WARP Made
  quantised(Bits bits, int scale, bool is_first, const ChannelJob& channel, float& rebuilt) const {
    const bool is_special = static_cast<Bits>(bits & Type::kExponent) == Type::kExponent;
    const std::uint32_t radius =
        warp_.frozen(kRadiusAt + (is_first ? channel.first_class : channel.rest_class));
    const int code = channel.code + scale;
    const float mean = BFloat16::load(channel.mean);
    const float value = Type::load(bits);
    const float centred = rows_.has_mean != 0 ? difference(value, mean) : value;
    const float rho = product(static_cast<float>(channel.rho), 0x1p-8F);
    const float predicted = rows_.has_dpcm != 0 ? product(rho, rebuilt) : 0.0F;
    const float scaled = product(difference(centred, predicted), step_size(-code));
    const auto highest =
        static_cast<float>((radius << rows_.low_bits) + ((1U << rows_.low_bits) - 1));
    const float lowest = -static_cast<float>(radius << rows_.low_bits);
    // What is not a number passes all comparisons by: it is kept, as an exception.
    const float above = scaled < lowest - 1.0F ? lowest - 1.0F : scaled;
    const float clamped = highest + 1.0F < above ? highest + 1.0F : above;
    const float rounded = is_special ? 0.0F : nearest(clamped);
    const float inside = rounded < lowest ? lowest : rounded;
    const float kept = highest < inside ? highest : inside;
    rebuilt = sum(product(kept, step_size(code)), predicted);
    const Bits made = Type::store(rows_.has_mean != 0 ? sum(rebuilt, mean) : rebuilt);
    const bool is_overflow = static_cast<Bits>(made & Type::kExponent) == Type::kExponent;
    const bool is_number = kept == kept;
    return Made{is_number ? static_cast<std::int32_t>(kept) : 0,
                is_special || is_overflow || !(rounded == kept)};
  }

  KV_WARP void note_flags(std::uint32_t at,
                          std::uint32_t row,
                          std::uint32_t group,
                          PerLane<bool> (&is_exception)[2]) {
    const std::uint32_t even = warp_.ballot(is_exception[0]);
    const std::uint32_t odd = warp_.ballot(is_exception[1]);
    warp_.each([&](std::uint32_t lane) {
      if (lane == 0) {
        warp_.store(flags_at((row * segment_.num_heads + at) * groups_ + group),
                    Pair<std::uint32_t>{even, odd});
      }
    });
  }

  [[nodiscard]] KV_WARP std::uint64_t flags_at(std::uint32_t index) const {
    return segment_.flags + 8 * std::uint64_t{index};
  }

  /// A byte has a bit each of eight channels.
  KV_WARP void pack_lows(std::uint32_t at,
                         std::uint32_t row,
                         std::uint32_t group,
                         PerLane<std::uint32_t> (&lows)[2]) {
    const std::uint32_t row_nbytes = (rows_.dim + 7) / 8;
    const std::uint64_t place =
        std::uint64_t{head_of(at)} * rows_.tokens + segment_.first_token + row;
    for (std::uint32_t bit = 0; bit < rows_.low_bits; ++bit) {
      PerLane<bool> is_set[2];
      warp_.each([&](std::uint32_t lane) {
        is_set[0][lane] = (lows[0][lane] >> bit & 1U) != 0;
        is_set[1][lane] = (lows[1][lane] >> bit & 1U) != 0;
      });
      const std::uint32_t even = warp_.ballot(is_set[0]);
      const std::uint32_t odd = warp_.ballot(is_set[1]);
      warp_.each([&](std::uint32_t lane) {
        const std::uint32_t byte = group * 8 + lane;
        if (lane < 8 && byte < row_nbytes) {
          std::uint32_t packed = 0;
          KV_UNROLL
          for (std::uint32_t pair = 0; pair < 4; ++pair) {
            packed |= (even >> (4 * lane + pair) & 1U) << (2 * pair);
            packed |= (odd >> (4 * lane + pair) & 1U) << (2 * pair + 1);
          }
          warp_.store(lows_ + (place * rows_.low_bits + bit) * row_nbytes + byte,
                      static_cast<std::uint8_t>(packed));
        }
      });
    }
  }

  /// Lists exceptions in the order of the entries. @return how many there are.
  KV_WARP std::uint32_t list_exceptions() {
    const std::uint32_t count = std::uint32_t{segment_.num_tokens} * segment_.num_heads * groups_;
    std::uint32_t listed = 0;
    for (std::uint32_t from = 0; from < count; from += kLanes) {
      PerLane<bool> has_some;
      warp_.each([&](std::uint32_t lane) {
        has_some[lane] = false;
        if (from + lane < count) {
          const auto flags = warp_.template load<Pair<std::uint32_t>>(flags_at(from + lane));
          has_some[lane] = (flags.first | flags.second) != 0;
        }
      });
      std::uint32_t pending = warp_.ballot(has_some);
      for (std::uint32_t index = from; pending != 0; ++index, pending >>= 1U) {
        if ((pending & 1U) != 0) {
          listed += list_group(index, listed);
        }
      }
    }
    return listed;
  }

  KV_WARP std::uint32_t list_group(std::uint32_t index, std::uint32_t listed) {
    const auto flags = warp_.template load<Pair<std::uint32_t>>(flags_at(index));
    const std::uint32_t entry = index / groups_;
    const std::uint32_t group = index % groups_;
    const std::uint64_t source = source_row(entry % segment_.num_heads, entry / segment_.num_heads);
    warp_.each([&](std::uint32_t lane) {
      const std::uint32_t below = (1U << lane) - 1;
      std::uint32_t to =
          listed + count_bits(flags.first & below) + count_bits(flags.second & below);
      KV_UNROLL
      for (std::uint32_t p = 0; p < 2; ++p) {
        if (((p == 0 ? flags.first : flags.second) >> lane & 1U) != 0) {
          const std::uint32_t i = group * kEntries + 2 * lane + p;
          warp_.store(segment_.indices + 2 * std::uint64_t{to},
                      static_cast<std::uint16_t>(entry * rows_.dim + i));
          warp_.store(segment_.bits + std::uint64_t{to} * sizeof(Bits),
                      warp_.template get<Bits>(source + i * sizeof(Bits)));
          ++to;
        }
      }
    });
    return count_bits(flags.first) + count_bits(flags.second);
  }

  /// The entropy coder, from the last group to the first. @return the first word's place.
  KV_WARP std::uint32_t write_words() {
    SegmentWriter<Warp> writer(warp_, segment_);
    for (std::uint32_t row = segment_.num_tokens; row-- > 0;) {
      for (std::uint32_t at = segment_.num_heads; at-- > 0;) {
        for (std::uint32_t group = groups_; group-- > 0;) {
          write_step(writer, at, row, group * kEntries + 1);
          write_step(writer, at, row, group * kEntries);
        }
      }
    }
    if (rows_.has_row_scales != 0 && scale_class_ != kStoredScales) {
      const std::uint32_t count = std::uint32_t{segment_.num_heads} * segment_.num_tokens;
      for (std::uint32_t group = (count + kEntries - 1) / kEntries; group-- > 0;) {
        write_scales(writer, group * kEntries + 1, count);
        write_scales(writer, group * kEntries, count);
      }
    }
    return writer.finish(segment_.states);
  }

  KV_WARP void write_step(SegmentWriter<Warp>& writer,
                          std::uint32_t at,
                          std::uint32_t row,
                          std::uint32_t first) {
    writer.step([&](std::uint32_t lane) {
      const std::uint32_t i = first + 2 * lane;
      if (i >= rows_.dim) {
        return kNullWrite;
      }
      const auto channel = warp_.template load<ChannelJob>(channel_at(at, i));
      const std::uint32_t symbol = warp_.template load<std::uint8_t>(symbol_at(at, row, i));
      return entry_of(row == 0 ? channel.first_class : channel.rest_class, symbol);
    });
  }

  KV_WARP void write_scales(SegmentWriter<Warp>& writer, std::uint32_t first, std::uint32_t count) {
    writer.step([&](std::uint32_t lane) {
      const std::uint32_t index = first + 2 * lane;
      if (index >= count) {
        return kNullWrite;
      }
      const std::uint32_t at = index / segment_.num_tokens;
      const int base =
          warp_.template load<std::int16_t>(plane_.room + 2 * std::uint64_t{head_of(at)});
      const int residual = scale_of(at, index % segment_.num_tokens) - base;
      return entry_of(scale_class_, static_cast<std::uint32_t>(residual));
    });
  }

  [[nodiscard]] KV_WARP WriteEntry entry_of(std::uint32_t page, std::uint32_t symbol) const {
    return warp_.frozen(page * kPage + symbol % kPage);
  }

  static constexpr std::uint32_t kPage = kClassWritePage;

  Warp& warp_;
  const EncodePlaneJob& plane_;
  const PlaneJob& rows_;
  const EncodeSegmentJob& segment_;
  std::uint32_t scale_class_;
  std::uint32_t groups_;
  std::uint64_t lows_;
};

}  // namespace kv::warp
