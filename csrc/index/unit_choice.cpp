// SPDX-License-Identifier: Apache-2.0
// Chooses units by standard scores, without memory beyond a line of them.
#include "index/unit_choice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.hpp"

namespace kv {
namespace {

const std::int64_t* numbers(ConstBytes bytes) {
  return reinterpret_cast<const std::int64_t*>(bytes.data());
}

std::int64_t* numbers(Bytes bytes) { return reinterpret_cast<std::int64_t*>(bytes.data()); }

// Moves a line to mean 0, adds what neighbours have, and scales it to deviation 1; see
// `StandardScores` in retrieval/fusion.py. False where a score is not finite.
bool standardise(const float* scores, std::size_t count, float share, std::vector<float>& line) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    sum += scores[i];
  }
  if (!std::isfinite(sum)) {
    return false;
  }
  const float mean = static_cast<float>(sum / static_cast<double>(count));
  float before = 0;
  double squares = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const float own = scores[i] - mean;
    const float behind = i + 1 < count ? scores[i + 1] - mean : 0;
    line[i] = own + share * before + share * behind;
    squares += static_cast<double>(line[i]) * line[i];
    before = own;
  }
  const double deviation = std::sqrt(squares / static_cast<double>(count));
  const float scale = std::max(static_cast<float>(deviation), std::numeric_limits<float>::min());
  for (std::size_t i = 0; i < count; ++i) {
    line[i] /= scale;
  }
  return std::isfinite(deviation);
}

bool fuse(const std::vector<UnitScores>& views,
          std::size_t num_units,
          std::size_t num_lists,
          float* fused) {
  std::fill_n(fused, num_lists * num_units, 0.0F);
  std::vector<float> line(num_units);
  for (const UnitScores& view : views) {
    const auto* scores = reinterpret_cast<const float*>(view.scores.data());
    const std::size_t lines = view.scores.size() / (num_units * sizeof(float));
    const std::size_t served = num_lists / lines;
    for (std::size_t number = 0; number < lines; ++number) {
      if (!standardise(scores + number * num_units, num_units, view.share, line)) {
        return false;
      }
      for (std::size_t list = number * served; list < (number + 1) * served; ++list) {
        for (std::size_t i = 0; i < num_units; ++i) {
          fused[list * num_units + i] += view.weight * line[i];
        }
      }
    }
  }
  return true;
}

// Units of one list that fit the budget, ascending.
void take_best(const float* fused,
               const std::int64_t* before,
               std::size_t num_units,
               std::int64_t budget_tokens,
               std::vector<std::size_t>& left,
               std::vector<std::size_t>& taken) {
  left.clear();
  taken.clear();
  for (std::size_t unit = 0; unit < num_units; ++unit) {
    if (before[unit] > 0) {
      left.push_back(unit);
    }
  }
  const auto is_worse = [fused](std::size_t a, std::size_t b) {
    return fused[a] < fused[b] || (fused[a] == fused[b] && a > b);
  };
  std::make_heap(left.begin(), left.end(), is_worse);
  std::int64_t room = budget_tokens;
  while (room > 0 && !left.empty()) {
    const std::size_t best = left.front();
    if (before[best] > room && !taken.empty()) {
      break;
    }
    room -= before[best];
    taken.push_back(best);
    std::pop_heap(left.begin(), left.end(), is_worse);
    left.pop_back();
  }
  std::sort(taken.begin(), taken.end());
}

}  // namespace

bool choose_units(const std::vector<UnitScores>& views,
                  const UnitLists& table,
                  std::int64_t budget_tokens,
                  std::size_t num_lists,
                  const ChosenUnits& out) {
  const std::size_t num_units = table.starts.size() / sizeof(std::int64_t);
  const std::size_t num_tokens = table.tokens.size() / sizeof(std::int64_t);
  KV_EXPECT(num_units > 0 && num_lists > 0 && table.sizes.size() == table.starts.size() &&
                table.before.size() == table.starts.size() && num_units <= out.chosen.size() &&
                num_lists == out.chosen.size() / num_units &&
                out.chosen.size() == num_lists * num_units &&
                out.fused.size() == out.chosen.size() * sizeof(float) &&
                out.counts.size() == num_lists * 2 * sizeof(std::int64_t),
            ShapeError, "units, lists and room for what is chosen do not fit each other");
  for (const UnitScores& view : views) {
    const std::size_t lines = view.scores.size() / (num_units * sizeof(float));
    KV_EXPECT(lines > 0 && num_lists % lines == 0 &&
                  view.scores.size() == lines * num_units * sizeof(float),
              ShapeError, "scores of a view are not lines of all units");
  }
  const std::int64_t* starts = numbers(table.starts);
  const std::int64_t* sizes = numbers(table.sizes);
  const std::int64_t* before = numbers(table.before);
  const auto end = static_cast<std::int64_t>(num_tokens);
  for (std::size_t unit = 0; unit < num_units; ++unit) {
    KV_EXPECT(starts[unit] >= 0 && starts[unit] <= end && before[unit] >= 0 &&
                  before[unit] <= sizes[unit] && sizes[unit] <= end - starts[unit],
              ShapeError, "a unit holds tokens that the table has not");
  }
  auto* fused = reinterpret_cast<float*>(out.fused.data());
  if (!fuse(views, num_units, num_lists, fused)) {
    return false;
  }
  const std::size_t most_units = out.units.size() / (num_lists * sizeof(std::int64_t));
  const std::size_t most_tokens = out.tokens.size() / (num_lists * sizeof(std::int64_t));
  std::vector<std::size_t> left;
  std::vector<std::size_t> taken;
  std::fill_n(out.chosen.data(), out.chosen.size(), std::uint8_t{0});
  for (std::size_t list = 0; list < num_lists; ++list) {
    float* scores = fused + list * num_units;
    take_best(scores, before, num_units, budget_tokens, left, taken);
    KV_EXPECT(taken.size() <= most_units, ShapeError, "no room for all units that are chosen");
    std::int64_t* units = numbers(out.units) + list * most_units;
    std::int64_t* tokens = numbers(out.tokens) + list * most_tokens;
    std::size_t count = 0;
    for (const std::size_t unit : taken) {
      const auto size = static_cast<std::size_t>(before[unit]);
      KV_EXPECT(size <= most_tokens - count, ShapeError,
                "no room for all tokens of what is chosen");
      *units++ = static_cast<std::int64_t>(unit);
      out.chosen.data()[list * num_units + unit] = 1;
      count += static_cast<std::size_t>(
          std::copy_n(numbers(table.tokens) + starts[unit], size, tokens + count) -
          (tokens + count));
    }
    numbers(out.counts)[2 * list] = static_cast<std::int64_t>(taken.size());
    numbers(out.counts)[2 * list + 1] = static_cast<std::int64_t>(count);
    for (std::size_t unit = 0; unit < num_units; ++unit) {
      if (before[unit] == 0) {
        scores[unit] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  return true;
}

}  // namespace kv
