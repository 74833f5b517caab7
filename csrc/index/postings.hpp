// SPDX-License-Identifier: Apache-2.0
// What blocks earn by the words that stand in them.
#pragma once

#include <cstddef>

#include "core/span.hpp"

namespace kv {

/// As many words as two bytes can name.
inline constexpr std::size_t kMostWords = 1U << 16U;

/// What words earn: word by word, for each token of a question that it is near to.
struct WordGains {
  /// `uint16` for each of the 65,536 words: 1 and its place among those that earn something, or 0.
  ConstBytes places;
  /// `uint32`, one more than there are places: where the gains of each begin, and where the last
  /// ones end.
  ConstBytes starts;
  /// `uint32`: the token of each gain.
  ConstBytes tokens;
  /// `float`: the gains.
  ConstBytes gains;
  std::size_t num_tokens = 0;
};

/// Sums up, block by block, the largest gain of each token over the block's words.
///
/// @param postings words, `uint16`, of one block after the other.
/// @param sizes `uint32`, of each block: how many words.
/// @param words what they earn.
/// @param totals `float` of each block, written.
/// @throws ShapeError when the spans do not fit each other.
void score_postings(ConstBytes postings, ConstBytes sizes, const WordGains& words, Bytes totals);

}  // namespace kv
