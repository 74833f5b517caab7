// SPDX-License-Identifier: Apache-2.0
// One pass over all postings, without a branch.
#include "index/postings.hpp"

#include <cstdint>
#include <cstring>
#include <limits>

#include "core/error.hpp"

namespace kv {

std::size_t find_words(ConstBytes postings, ConstBytes wanted, Bytes places) {
  const std::size_t count = postings.size() / sizeof(std::uint16_t);
  KV_EXPECT(postings.size() % sizeof(std::uint16_t) == 0 && wanted.size() == kMostWords &&
                places.size() / sizeof(std::uint32_t) >= count &&
                count <= std::numeric_limits<std::uint32_t>::max(),
            ShapeError, "postings, wanted words or places have other sizes");
  std::size_t found = 0;
  for (std::size_t at = 0; at < count; ++at) {
    std::uint16_t word = 0;
    std::memcpy(&word, postings.data() + at * sizeof(word), sizeof(word));
    const auto place = static_cast<std::uint32_t>(at);
    // Always written, rarely kept: which words are wanted is not to be foreseen, and a branch would
    // be.
    std::memcpy(places.data() + found * sizeof(place), &place, sizeof(place));
    found += wanted.data()[word] != 0 ? 1U : 0U;
  }
  return found;
}

}  // namespace kv
