// SPDX-License-Identifier: Apache-2.0
// In-line tables of a plane: frequencies counted in the plane itself (FORMAT.md sections 5 and 9).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.hpp"
#include "entropy/classes.hpp"

namespace kv {

constexpr std::size_t kMaxAdaptiveTables = 16;
constexpr std::size_t kAlphabet = 256;
/// Pages of unsigned symbols in write tables.
constexpr std::size_t kAdaptiveWritePage = kAlphabet;

/// Frequencies of the 256 symbols; they sum to kProbabilityTotal.
struct AdaptiveTable {
  std::array<std::uint16_t, kAlphabet> frequencies{};
  std::uint8_t first = 0;
  std::uint8_t last = 0;
};

/// The table that section 9 prescribes for these counts.
[[nodiscard]] AdaptiveTable table_from(const std::array<std::uint32_t, kAlphabet>& counts) noexcept;

/// Appends the tables as section 5 stores them, padded to four bytes.
void append_tables(const std::vector<AdaptiveTable>& tables, std::vector<std::uint8_t>& out);

/// Reads `num_tables` tables from the start of `bytes`.
/// @return bytes used, padding included; 0 when they are cut off or a table is not valid.
[[nodiscard]] std::size_t read_tables(ConstBytes bytes,
                                      std::size_t num_tables,
                                      std::vector<AdaptiveTable>& tables);

/// One page a table, and the null page behind them.
[[nodiscard]] std::vector<ReadEntry> read_pages(const std::vector<AdaptiveTable>& tables);
[[nodiscard]] std::vector<WriteEntry> write_pages(const std::vector<AdaptiveTable>& tables);

}  // namespace kv
