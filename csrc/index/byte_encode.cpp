// SPDX-License-Identifier: Apache-2.0
// Makes byte rows of floats, without memory of its own.
#include <algorithm>
#include <cstring>

#include "index/byte_rows.hpp"

namespace kv {
namespace {

constexpr float kSteps = 255;

// Smallest and largest of each channel, the largest in `step` for now.
void find_ranges(
    const float* rows, std::size_t num_rows, std::size_t width, float* low, float* step) noexcept {
  std::copy_n(rows, width, low);
  std::copy_n(rows, width, step);
  for (std::size_t row = 1; row < num_rows; ++row) {
    const float* elements = rows + row * width;
    for (std::size_t i = 0; i < width; ++i) {
      low[i] = std::min(low[i], elements[i]);
      step[i] = std::max(step[i], elements[i]);
    }
  }
  for (std::size_t i = 0; i < width; ++i) {
    step[i] = (step[i] - low[i]) / kSteps;
  }
}

void encode_row(const float* elements,
                const float* low,
                const float* step,
                std::size_t width,
                std::uint8_t* codes) noexcept {
  for (std::size_t i = 0; i < width; ++i) {
    const float scaled = step[i] > 0 ? (elements[i] - low[i]) / step[i] : 0;
    const float rounded = std::min(kSteps, std::max(0.0F, scaled)) + 0.5F;
    codes[i / kGroupChannels * kBlockGroupNbytes + i % kGroupChannels] =
        static_cast<std::uint8_t>(rounded);
  }
}

}  // namespace

void encode_byte_rows(ConstBytes rows,
                      Bytes codes,
                      Bytes low,
                      Bytes step,
                      std::size_t partitions,
                      std::size_t num_rows,
                      std::size_t width) {
  const ByteRows made({codes.data(), codes.size()}, {low.data(), low.size()},
                      {step.data(), step.size()}, partitions, num_rows, width);
  KV_EXPECT(rows.size() == partitions * num_rows * width * sizeof(float), ShapeError,
            "rows do not have the size of their elements");
  std::memset(codes.data(), 0, codes.size());
  const auto* elements = reinterpret_cast<const float*>(rows.data());
  auto* lows = reinterpret_cast<float*>(low.data());
  auto* steps = reinterpret_cast<float*>(step.data());
  for (std::size_t partition = 0; partition < partitions; ++partition) {
    find_ranges(elements, num_rows, width, lows, steps);
    std::uint8_t* target = codes.data() + partition * (codes.size() / partitions);
    for (std::size_t row = 0; row < num_rows; ++row) {
      const std::size_t block = row / kBlockRows * made.groups() * kBlockGroupNbytes;
      encode_row(elements + row * width, lows, steps, width,
                 target + block + row % kBlockRows * kGroupChannels);
    }
    elements += num_rows * width;
    lows += width;
    steps += width;
  }
}

}  // namespace kv
