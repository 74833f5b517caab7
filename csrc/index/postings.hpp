// SPDX-License-Identifier: Apache-2.0
// Looking wanted words up among the words of many blocks.
#pragma once

#include <cstddef>

#include "core/span.hpp"

namespace kv {

/// As many words as two bytes can name.
inline constexpr std::size_t kMostWords = 1U << 16U;

/// Finds where wanted words stand.
///
/// @param postings words, `uint16`.
/// @param wanted a byte for each of the 65,536 words, not 0 for those that are wanted.
/// @param places `uint32`, as many as there are postings: receives the positions, ascending.
/// @return how many.
/// @throws ShapeError when the spans are not of these sizes.
std::size_t find_words(ConstBytes postings, ConstBytes wanted, Bytes places);

}  // namespace kv
