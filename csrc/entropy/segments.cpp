// SPDX-License-Identifier: Apache-2.0
// Divisions with remainders, and the pair interleave.
#include "entropy/segments.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace kv {
namespace {

constexpr std::size_t kWantedSymbols = 32768;
constexpr std::size_t kWantedTokens = 256;

constexpr std::size_t divide_up(std::size_t value, std::size_t by) noexcept {
  return (value + by - 1) / by;
}

}  // namespace

bool SegmentGrid::is_valid() const noexcept {
  if (tokens == 0 || segment_heads == 0 || segment_heads > heads || segment_tokens == 0) {
    return false;
  }
  // Each factor is at most 65536: the product stays below 2^48.
  return segment_heads * std::min(segment_tokens, tokens) * padded_dim() <= kMaxSegmentSymbols;
}

std::size_t SegmentGrid::size() const noexcept {
  return divide_up(heads, segment_heads) * divide_up(tokens, segment_tokens);
}

Segment SegmentGrid::at(std::size_t index) const noexcept {
  const std::size_t cuts = divide_up(tokens, segment_tokens);
  const std::size_t head = index / cuts * segment_heads;
  const std::size_t token = index % cuts * segment_tokens;
  return Segment{head, std::min(segment_heads, heads - head), token,
                 std::min(segment_tokens, tokens - token)};
}

std::size_t chosen_segment_tokens(std::size_t num_tokens, std::size_t largest_dim) {
  const std::size_t padded = divide_up(largest_dim, kGroup) * kGroup;
  const std::size_t most = std::max(std::size_t{1}, kWantedSymbols / padded);
  return std::min({num_tokens, most, kWantedTokens});
}

std::size_t chosen_segment_heads(std::size_t heads,
                                 std::size_t dim,
                                 std::size_t coded_tokens,
                                 std::size_t segment_tokens) {
  const std::size_t padded = divide_up(dim, kGroup) * kGroup;
  const std::size_t rows = std::min(segment_tokens, coded_tokens);
  const std::size_t most = std::max(std::size_t{1}, kWantedSymbols / (padded * rows));
  return divide_up(heads, divide_up(heads, most));
}

std::vector<std::uint32_t> lane_bases(const std::uint8_t* pages,
                                      std::size_t heads,
                                      std::size_t dim,
                                      std::size_t null_page,
                                      std::size_t page_size) {
  const std::size_t padded = divide_up(dim, kGroup) * kGroup;
  std::vector<std::uint32_t> bases(heads * padded);
  std::uint32_t* group = bases.data();
  for (std::size_t head = 0; head < heads; ++head, pages += dim) {
    for (std::size_t first = 0; first < padded; first += kGroup, group += kGroup) {
      std::array<std::uint8_t, kGroup> of_group;
      of_group.fill(static_cast<std::uint8_t>(null_page));
      std::memcpy(of_group.data(), pages + first, std::min(kGroup, dim - first));
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        group[lane] = static_cast<std::uint32_t>(of_group[2 * lane] * page_size);
        group[kLanes + lane] = static_cast<std::uint32_t>(of_group[2 * lane + 1] * page_size);
      }
    }
  }
  return bases;
}

}  // namespace kv
