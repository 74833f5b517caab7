// SPDX-License-Identifier: Apache-2.0
// Which units are read: scores of several views in standard deviations, summed, under a budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.hpp"

namespace kv {

/// Scores of one view: a line of floats, one for each unit, for as many lists as a line serves.
///
/// The line is `share` of what the units right before and behind have, added to a unit's own.
struct UnitScores {
  ConstBytes scores;
  float weight;
  float share;
};

/// Tokens of units: unit i holds `tokens[starts[i]]` and the `sizes[i] - 1` behind it, ascending,
/// of which the first `before[i]` may be read. int64 all of them.
struct UnitLists {
  ConstBytes starts;
  ConstBytes sizes;
  ConstBytes before;
  ConstBytes tokens;
};

/// What is chosen for each list; lines are as long as the spans allow.
///
/// `fused` [lists, units] float32, `chosen` [lists, units] bytes of 0 or 1, `units` and `tokens`
/// [lists, most] int64, ascending, `counts` [lists, 2] int64: units and tokens.
struct ChosenUnits {
  Bytes fused;
  Bytes chosen;
  Bytes units;
  Bytes tokens;
  Bytes counts;
};

/// Takes the best units of each list, until the next one would not fit; the best one in any case.
///
/// @returns false where a score is not finite: nothing was chosen then.
/// @throws ShapeError when the spans do not fit each other, or the table names tokens that it has
///     not.
[[nodiscard]] bool choose_units(const std::vector<UnitScores>& views,
                                const UnitLists& table,
                                std::int64_t budget_tokens,
                                std::size_t num_lists,
                                const ChosenUnits& out);

}  // namespace kv
