// SPDX-License-Identifier: Apache-2.0
// Sums queries, compares them with rows, and lets the scores choose.
#include "index/unit_question.hpp"

#include <algorithm>
#include <array>
#include <string>

#include "core/cpu.hpp"
#include "core/error.hpp"

namespace kv {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kMostHeads = 1U << 16U;
constexpr std::size_t kMostGroup = 1U << 16U;

// Sums run in sixteen lanes, in one order on every machine.
__attribute__((always_inline)) inline float product(const float* query,
                                                    const float* row,
                                                    std::size_t width) noexcept {
  std::array<float, kLanes> sums{};
  std::size_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += query[at + lane] * row[at + lane];
    }
  }
  for (std::size_t lane = 0; at + lane < width; ++lane) {
    sums[lane] += query[at + lane] * row[at + lane];
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return sums[0];
}

using FloatLoop = void (*)(const float* query,
                           const float* rows,
                           std::size_t num_rows,
                           std::size_t width,
                           float* scores) noexcept;

void multiply_plainly(const float* query,
                      const float* rows,
                      std::size_t num_rows,
                      std::size_t width,
                      float* scores) noexcept {
  for (std::size_t row = 0; row < num_rows; ++row) {
    scores[row] = product(query, rows + row * width, width);
  }
}

#ifdef KV_X86
KV_TARGET_AVX2 void multiply_by_avx2(const float* query,
                                     const float* rows,
                                     std::size_t num_rows,
                                     std::size_t width,
                                     float* scores) noexcept {
  for (std::size_t row = 0; row < num_rows; ++row) {
    scores[row] = product(query, rows + row * width, width);
  }
}
#endif

FloatLoop float_loop() noexcept {
#ifdef KV_X86
  if (simd_level() >= SimdLevel::kAvx2) {
    return multiply_by_avx2;
  }
#endif
  return multiply_plainly;
}

bool is_aligned(ConstBytes floats) noexcept {
  return reinterpret_cast<std::uintptr_t>(floats.data()) % alignof(float) == 0;
}

std::size_t width_of(const AskedView& view, const Queries& asked) noexcept {
  return view.is_bound ? 2 * asked.dim : asked.dim;
}

void check(const AskedView& view, const Queries& asked, std::size_t num_units) {
  const std::size_t width = width_of(view, asked);
  std::size_t rows = 0;
  for (const ByteRows* segment : view.segments) {
    KV_EXPECT(
        segment != nullptr && segment->partitions() == asked.heads && segment->width() == width,
        ShapeError, "a segment has not the heads or elements that queries ask for");
    rows += segment->rows();
  }
  const std::size_t line = asked.heads * width * sizeof(float);
  for (const FloatRows& each : view.floats) {
    KV_EXPECT(is_aligned(each.rows) && each.rows.size() % line == 0 &&
                  each.num_rows <= each.rows.size() / line,
              ShapeError, "rows have not the heads or elements that queries ask for");
    rows += each.num_rows;
  }
  KV_EXPECT(
      rows == num_units, ShapeError,
      "a view of " + std::to_string(rows) + " rows, of " + std::to_string(num_units) + " units");
}

// Adds what a query asks a view: by factors of its own elements, and of those half a head away.
void lift(const float* query,
          const float* own,
          const float* other,
          std::size_t dim,
          bool is_bound,
          float* asking) noexcept {
  const std::size_t half = dim / 2;
  for (std::size_t i = 0; i < dim; ++i) {
    const float far = query[i < dim - half ? i + half : i + half - dim];
    const float element = query[i] * own[i] + far * other[i];
    if (is_bound) {
      asking[i] += std::max(element, 0.0F);
      asking[dim + i] += std::min(element, 0.0F);
    } else {
      asking[i] += element;
    }
  }
}

// [heads, num_units] scores, or one line of their sums.
std::vector<float> score(const AskedView& view,
                         const Queries& asked,
                         const float* factors,
                         std::size_t num_units,
                         std::size_t num_threads) {
  const std::size_t width = width_of(view, asked);
  std::vector<float> asking(asked.heads * width);
  const auto* query = reinterpret_cast<const float*>(asked.elements.data());
  for (std::size_t number = 0; number < asked.heads * asked.group; ++number) {
    lift(query + number * asked.dim, factors, factors + asked.dim, asked.dim, view.is_bound,
         asking.data() + number / asked.group * width);
  }
  std::vector<float> scores(asked.heads * num_units);
  std::size_t column = 0;
  if (!view.segments.empty()) {
    score_byte_rows({{view.segments, asking.data(), scores.data(), 1, num_units}}, num_threads);
    for (const ByteRows* segment : view.segments) {
      column += segment->rows();
    }
  }
  const FloatLoop loop = float_loop();
  for (const FloatRows& each : view.floats) {
    const auto* rows = reinterpret_cast<const float*>(each.rows.data());
    const std::size_t stride = each.rows.size() / (asked.heads * sizeof(float));
    for (std::size_t head = 0; head < asked.heads; ++head) {
      loop(asking.data() + head * width, rows + head * stride, each.num_rows, width,
           scores.data() + head * num_units + column);
    }
    column += each.num_rows;
  }
  if (view.is_shared) {
    for (std::size_t head = 1; head < asked.heads; ++head) {
      for (std::size_t i = 0; i < num_units; ++i) {
        scores[i] += scores[head * num_units + i];
      }
    }
    scores.resize(num_units);
  }
  return scores;
}

}  // namespace

bool ask_units(const std::vector<AskedView>& views,
               const Queries& asked,
               const UnitLists& table,
               std::int64_t budget_tokens,
               std::size_t num_lists,
               std::size_t num_threads,
               const ChosenUnits& out) {
  const std::size_t num_units = table.starts.size() / sizeof(std::int64_t);
  KV_EXPECT(asked.heads > 0 && asked.heads <= kMostHeads && asked.group > 0 &&
                asked.group <= kMostGroup && asked.dim > 0 && asked.dim <= kMostChannels &&
                asked.elements.size() == asked.heads * asked.group * asked.dim * sizeof(float) &&
                is_aligned(asked.elements) && is_aligned(asked.factors) &&
                asked.factors.size() == views.size() * 2 * asked.dim * sizeof(float),
            ShapeError, "queries are not one for each head, or factors not one pair for each view");
  for (const AskedView& view : views) {
    check(view, asked, num_units);
  }
  std::vector<std::vector<float>> scores;
  std::vector<UnitScores> lines;
  scores.reserve(views.size());
  const auto* factors = reinterpret_cast<const float*>(asked.factors.data());
  for (const AskedView& view : views) {
    const std::vector<float>& found =
        scores.emplace_back(score(view, asked, factors, num_units, num_threads));
    lines.push_back({ConstBytes(reinterpret_cast<const std::uint8_t*>(found.data()),
                                found.size() * sizeof(float)),
                     view.weight, view.share});
    factors += 2 * asked.dim;
  }
  return choose_units(lines, table, budget_tokens, num_lists, out);
}

}  // namespace kv
