// SPDX-License-Identifier: Apache-2.0
// One layer asks all views of its units at once: queries in, what is read out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.hpp"
#include "index/byte_rows.hpp"
#include "index/unit_choice.hpp"

namespace kv {

/// Rows as they came: float32 [heads, capacity, width], of which the first `num_rows` of a head
/// count.
struct FloatRows {
  ConstBytes rows;
  std::size_t num_rows;
};

/// How units are compared with the queries of the heads that read them.
struct AskedView {
  std::vector<const ByteRows*> segments;  ///< the first rows
  std::vector<FloatRows> floats;          ///< those behind them
  bool is_bound;   ///< queries ask as [max(q, 0) | min(q, 0)], else as they are
  bool is_shared;  ///< all heads choose together, by the sum of their scores
  float weight;    ///< see `UnitScores`
  float share;
};

/// Queries of one token: [heads, group, dim] float32, before any rotation.
///
/// View v takes them as `q[i] * factors[v][0][i] + q[(i + dim / 2) % dim] * factors[v][1][i]`, by
/// float32 [views, 2, dim]: a rotation in halves, to where the view compares them.
struct Queries {
  ConstBytes elements;
  ConstBytes factors;
  std::size_t heads;
  std::size_t group;
  std::size_t dim;
};

/// Chooses by the inner products of the rows with the sum of a group's queries; see `choose_units`.
///
/// A score is the same on every machine and for any number of threads.
///
/// @returns false where a score is not finite: nothing was chosen then.
/// @throws ShapeError when rows, queries, table and room do not fit each other.
[[nodiscard]] bool ask_units(const std::vector<AskedView>& views,
                             const Queries& queries,
                             const UnitLists& table,
                             std::int64_t budget_tokens,
                             std::size_t num_lists,
                             std::size_t num_threads,
                             const ChosenUnits& out);

}  // namespace kv
