// SPDX-License-Identifier: Apache-2.0
// The scales of a plane with steps per token, one warp a plane (FORMAT.md sections 6.4 and 9).
#pragma once

#include <cstdint>

#include "elements/elements.hpp"
#include "warp/encode_jobs.hpp"
#include "warp/rows.hpp"

namespace kv::warp {

template <typename Type, typename Warp>
class ScaleChooser {
 public:
  using Bits = typename Type::Bits;

  KV_WARP ScaleChooser(Warp& warp, const EncodePlaneJob& plane)
      : warp_(warp), plane_(plane), rows_(plane.rows) {}

  /// Writes bases, scales and, where they are not coded, the stored scales.
  /// @return the class of the residuals.
  KV_WARP std::uint32_t choose() {
    measure();
    warp_.sync();
    bool is_coded = true;
    for (std::uint32_t from = 0; from < rows_.heads; from += kLanes) {
      typename Warp::template PerLane<bool> is_wide;
      warp_.each([&](std::uint32_t lane) {
        const Range range = from + lane < rows_.heads ? range_of(from + lane) : Range{0, 0};
        is_wide[lane] = range.high - range.low > kWidestSpread;
      });
      is_coded = warp_.ballot(is_wide) == 0 && is_coded;
    }
    typename Warp::template PerLane<std::uint64_t> sums;
    typename Warp::template PerLane<std::uint64_t> largest;
    warp_.each([&](std::uint32_t lane) { sums[lane] = largest[lane] = 0; });
    for (std::uint32_t from = 0; from < rows_.heads; from += kLanes) {
      warp_.each([&](std::uint32_t lane) {
        if (from + lane < rows_.heads) {
          settle_head(from + lane, is_coded, sums[lane], largest[lane]);
        }
      });
    }
    if (!is_coded) {
      return kStoredScales;
    }
    warp_.each([&](std::uint32_t lane) {
      warp_.store(plane_.spreads + 16 * std::uint64_t{lane}, sums[lane]);
      warp_.store(plane_.spreads + 16 * std::uint64_t{lane} + 8, largest[lane]);
    });
    warp_.sync();
    return class_of_residuals();
  }

 private:
  static constexpr int kZeroRow = -(1 << 30);
  static constexpr int kWidestSpread = 126;
  static constexpr int kLargestOffset = 255;
  static constexpr std::uint32_t kPartials = 16;

  struct Range {
    int low;
    int high;
  };

  /// What each row would like as its scale; a lane a row.
  KV_WARP void measure() {
    const std::uint64_t count = std::uint64_t{rows_.heads} * rows_.tokens;
    for (std::uint64_t from = 0; from < count; from += kLanes) {
      warp_.each([&](std::uint32_t lane) {
        const std::uint64_t at = from + lane;
        if (at < count) {
          const auto head = static_cast<std::uint32_t>(at / rows_.tokens);
          const auto token = static_cast<std::uint32_t>(at % rows_.tokens);
          const std::uint64_t row = row_address(warp_, rows_, head, rows_.raw_rows + token);
          warp_.store(plane_.wanted + 4 * at, wanted_of(product(energy(row), plane_.inverse_dim)));
        }
      });
    }
  }

  /// sum16 of the squares.
  [[nodiscard]] KV_WARP float energy(std::uint64_t row) const {
    float partials[kPartials] = {};
    for (std::uint32_t at = 0; at < rows_.dim; at += kPartials) {
      KV_UNROLL
      for (std::uint32_t i = 0; i < kPartials; ++i) {
        if (at + i < rows_.dim) {
          const auto bits = warp_.template get<Bits>(row + (at + i) * sizeof(Bits));
          const bool is_special = static_cast<Bits>(bits & Type::kExponent) == Type::kExponent;
          const float value = is_special ? 0.0F : Type::load(bits);
          partials[i] = sum(partials[i], product(value, value));
        }
      }
    }
    KV_UNROLL
    for (std::uint32_t half = kPartials / 2; half > 0; half /= 2) {
      KV_UNROLL
      for (std::uint32_t i = 0; i < half; ++i) {
        partials[i] = sum(partials[i], partials[i + half]);
      }
    }
    return partials[0];
  }

  [[nodiscard]] KV_WARP int wanted_of(float mean_square) const {
    constexpr std::uint32_t kSmallestBits = (127U - 120U) << 23;
    const std::uint32_t bits = bits_of(mean_square);
    if (bits < kSmallestBits) {
      return kZeroRow;
    }
    int log16 = 16 * (static_cast<int>(bits >> 23) - 127);
    KV_UNROLL
    for (std::uint32_t i = 0; i < 16; ++i) {
      log16 += (bits & 0x7FFFFFU) >= warp_.frozen(kLog16At + i) ? 1 : 0;
    }
    return clamped(((log16 + 2) >> 2) - plane_.mult);
  }

  [[nodiscard]] static KV_WARP int clamped(int code) {
    const int low = code < -kMaxStepCode ? -kMaxStepCode : code;
    return low > kMaxStepCode ? kMaxStepCode : low;
  }

  [[nodiscard]] KV_WARP int wanted(std::uint32_t head, std::uint32_t token) const {
    return warp_.template load<std::int32_t>(plane_.wanted +
                                             4 * (std::uint64_t{head} * rows_.tokens + token));
  }

  /// Of the rows that are not zero.
  [[nodiscard]] KV_WARP Range range_of(std::uint32_t head) const {
    Range range{0, 0};
    bool is_first = true;
    for (std::uint32_t token = 0; token < rows_.tokens; ++token) {
      const int each = wanted(head, token);
      if (each != kZeroRow) {
        range.low = is_first || each < range.low ? each : range.low;
        range.high = is_first || each > range.high ? each : range.high;
        is_first = false;
      }
    }
    return range;
  }

  KV_WARP void settle_head(std::uint32_t head,
                           bool is_coded,
                           std::uint64_t& sum_of_residuals,
                           std::uint64_t& largest) {
    const Range range = range_of(head);
    const int lowest = range.high - kLargestOffset;
    const int base = is_coded             ? (range.low + range.high + 1) >> 1
                     : lowest > range.low ? lowest
                                          : range.low;
    warp_.store(plane_.room + 2 * std::uint64_t{head}, static_cast<std::int16_t>(base));
    const std::uint64_t stored = plane_.room + padded_to(2 * std::uint64_t{rows_.heads}, 4);
    for (std::uint32_t token = 0; token < rows_.tokens; ++token) {
      const std::uint64_t at = std::uint64_t{head} * rows_.tokens + token;
      const int each = wanted(head, token);
      int offset = each == kZeroRow ? 0 : each - base;
      if (!is_coded) {
        offset = offset > 0 ? offset : 0;
        warp_.store(stored + at, static_cast<std::uint8_t>(offset));
      }
      const auto magnitude = static_cast<std::uint64_t>(offset < 0 ? -offset : offset);
      sum_of_residuals += magnitude;
      largest = magnitude > largest ? magnitude : largest;
      warp_.store(rows_.scales + 2 * at, static_cast<std::int16_t>(base + offset));
    }
  }

  [[nodiscard]] KV_WARP std::uint32_t class_of_residuals() const {
    std::uint64_t total = 0;
    std::uint64_t largest = 0;
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      total += warp_.template load<std::uint64_t>(plane_.spreads + 16 * std::uint64_t{lane});
      const auto each =
          warp_.template load<std::uint64_t>(plane_.spreads + 16 * std::uint64_t{lane} + 8);
      largest = each > largest ? each : largest;
    }
    const std::uint64_t spread = 80 * total / (std::uint64_t{rows_.heads} * rows_.tokens);
    std::uint32_t chosen = 0;
    while (chosen + 1 < kNumClasses && spread * spread >= std::uint64_t{1} << (chosen + 1 + 6)) {
      ++chosen;
    }
    while (warp_.frozen(kRadiusAt + chosen) < largest) {
      ++chosen;
    }
    return chosen;
  }

  Warp& warp_;
  const EncodePlaneJob& plane_;
  const PlaneJob& rows_;
};

}  // namespace kv::warp
