// SPDX-License-Identifier: Apache-2.0
// Scales in eighths of an octave, in integers once the energies are known.
#include "planes/scales.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "elements/element_loops.hpp"

namespace kv {
namespace {

constexpr int kZeroRow = std::numeric_limits<int>::min();
constexpr int kWidestSpread = 126;
constexpr std::uint8_t kLargestOffset = 255;

struct Range {
  int low = 0;
  int high = 0;
};

Range range_of(const int* wanted, std::size_t count) noexcept {
  Range range;
  bool is_first = true;
  for (std::size_t i = 0; i < count; ++i) {
    if (wanted[i] == kZeroRow) {
      continue;
    }
    range.low = is_first ? wanted[i] : std::min(range.low, wanted[i]);
    range.high = is_first ? wanted[i] : std::max(range.high, wanted[i]);
    is_first = false;
  }
  return range;
}

std::uint8_t choose_class(const std::vector<std::uint8_t>& residuals) noexcept {
  std::uint64_t sum = 0;
  int largest = 0;
  for (const std::uint8_t residual : residuals) {
    const int magnitude = std::abs(static_cast<std::int8_t>(residual));
    sum += static_cast<std::uint64_t>(magnitude);
    largest = std::max(largest, magnitude);
  }
  const std::uint64_t spread = 80 * sum / residuals.size();
  std::size_t chosen = 0;
  while (chosen + 1 < kNumClasses && spread * spread >= std::uint64_t{1} << (chosen + 1 + 6)) {
    ++chosen;
  }
  while (class_tables().radius[chosen] < largest) {
    ++chosen;
  }
  return static_cast<std::uint8_t>(chosen);
}

}  // namespace

int log_rms_of(float mean_square, int otherwise) noexcept {
  const int log = log16(mean_square);
  return log == kLogOfZero ? otherwise : (log + 2) >> 2;
}

Scales choose_scales(const PlaneShape& shape,
                     const SourceRows& source,
                     std::size_t raw_rows,
                     int mult) {
  const std::size_t tokens = shape.tokens - raw_rows;
  const ElementLoops& loops = element_loops(shape.dtype);
  const float inverse_dim = 1.0F / static_cast<float>(shape.dim);
  std::vector<int> wanted(shape.heads * tokens);
  for (std::size_t head = 0; head < shape.heads; ++head) {
    for (std::size_t row = 0; row < tokens; ++row) {
      const float energy = loops.energy(source.row(head, raw_rows + row), shape.dim);
      const int log_rms = log_rms_of(energy * inverse_dim, kZeroRow);
      wanted[head * tokens + row] =
          log_rms == kZeroRow ? kZeroRow
                              : std::min(std::max(log_rms - mult, -kMaxStepCode), kMaxStepCode);
    }
  }
  Scales scales;
  scales.bases.resize(shape.heads);
  scales.offsets.resize(wanted.size());
  bool is_coded = true;
  for (std::size_t head = 0; head < shape.heads; ++head) {
    const Range range = range_of(wanted.data() + head * tokens, tokens);
    is_coded = is_coded && range.high - range.low <= kWidestSpread;
  }
  for (std::size_t head = 0; head < shape.heads; ++head) {
    const Range range = range_of(wanted.data() + head * tokens, tokens);
    const int base = is_coded ? (range.low + range.high + 1) >> 1
                              : std::max(range.high - kLargestOffset, range.low);
    scales.bases[head] = static_cast<std::int16_t>(base);
    for (std::size_t row = head * tokens; row < (head + 1) * tokens; ++row) {
      int offset = wanted[row] == kZeroRow ? 0 : wanted[row] - base;
      offset = is_coded ? offset : std::max(offset, 0);
      scales.offsets[row] = static_cast<std::uint8_t>(offset);
    }
  }
  scales.scale_class = is_coded ? choose_class(scales.offsets) : kStoredScales;
  return scales;
}

}  // namespace kv
