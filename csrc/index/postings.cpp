// SPDX-License-Identifier: Apache-2.0
// One pass over all postings; few of them earn anything.
#include "index/postings.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/error.hpp"

namespace kv {
namespace {

template <typename Number>
std::vector<Number> numbers_of(ConstBytes bytes) {
  KV_EXPECT(bytes.size() % sizeof(Number) == 0, ShapeError, "a list ends inside a number");
  std::vector<Number> found(bytes.size() / sizeof(Number));
  if (!found.empty()) {
    std::memcpy(found.data(), bytes.data(), bytes.size());
  }
  return found;
}

}  // namespace

void score_postings(ConstBytes postings, ConstBytes sizes, const WordGains& words, Bytes totals) {
  const auto counts = numbers_of<std::uint32_t>(sizes);
  const auto places = numbers_of<std::uint16_t>(words.places);
  const auto starts = numbers_of<std::uint32_t>(words.starts);
  const auto tokens = numbers_of<std::uint32_t>(words.tokens);
  const auto gains = numbers_of<float>(words.gains);
  std::uint64_t num_postings = 0;
  for (const std::uint32_t count : counts) {
    num_postings += count;
  }
  const bool are_sized = postings.size() == num_postings * sizeof(std::uint16_t) &&
                         totals.size() == counts.size() * sizeof(float) &&
                         places.size() == kMostWords && tokens.size() == gains.size();
  const bool are_gains = !starts.empty() && std::is_sorted(starts.begin(), starts.end()) &&
                         starts.back() <= gains.size() &&
                         *std::max_element(places.begin(), places.end()) < starts.size() &&
                         std::all_of(
                             tokens.begin(), tokens.end(),
                             [&words](std::uint32_t token) { return token < words.num_tokens; });
  KV_EXPECT(are_sized && are_gains, ShapeError, "postings, words or totals do not fit each other");
  std::vector<float> best(words.num_tokens);
  const std::uint8_t* next = postings.data();
  for (std::size_t block = 0; block < counts.size(); ++block) {
    float total = 0;
    bool is_met = false;
    for (std::uint32_t at = 0; at < counts[block]; ++at, next += sizeof(std::uint16_t)) {
      std::uint16_t word = 0;
      std::memcpy(&word, next, sizeof(word));
      const std::uint16_t place = places[word];
      if (place == 0) {
        continue;
      }
      is_met = true;
      for (std::uint32_t gain = starts[place - 1U]; gain < starts[place]; ++gain) {
        float& had = best[tokens[gain]];
        if (gains[gain] > had) {
          total += gains[gain] - had;
          had = gains[gain];
        }
      }
    }
    std::memcpy(totals.data() + block * sizeof(total), &total, sizeof(total));
    if (is_met) {
      std::fill(best.begin(), best.end(), 0.0F);
    }
  }
}

}  // namespace kv
