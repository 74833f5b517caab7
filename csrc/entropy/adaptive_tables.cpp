// SPDX-License-Identifier: Apache-2.0
// Counts -> frequencies -> bits, and back.
#include "entropy/adaptive_tables.hpp"

#include <algorithm>
#include <numeric>

namespace kv {
namespace {

constexpr unsigned kFrequencyBits = 10;
constexpr std::size_t kAlignment = 4;

std::size_t stored_frequencies(std::uint8_t first, std::uint8_t last) noexcept {
  return first == last ? 0 : std::size_t{last} - first + 1;
}

}  // namespace

AdaptiveTable table_from(const std::array<std::uint32_t, kAlphabet>& counts) noexcept {
  AdaptiveTable table;
  const std::uint64_t total = std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
  if (total == 0) {
    table.frequencies[0] = kProbabilityTotal;
    return table;
  }
  int missing = static_cast<int>(kProbabilityTotal);
  bool is_first = true;
  for (std::size_t symbol = 0; symbol < kAlphabet; ++symbol) {
    if (counts[symbol] == 0) {
      continue;
    }
    const std::uint64_t share =
        (2 * std::uint64_t{kProbabilityTotal} * counts[symbol] + total) / (2 * total);
    table.frequencies[symbol] = static_cast<std::uint16_t>(std::max<std::uint64_t>(1, share));
    missing -= table.frequencies[symbol];
    if (is_first) {
      table.first = static_cast<std::uint8_t>(symbol);
      is_first = false;
    }
    table.last = static_cast<std::uint8_t>(symbol);
  }
  for (; missing != 0; missing += missing < 0 ? 1 : -1) {
    std::uint16_t& largest = *std::max_element(table.frequencies.begin(), table.frequencies.end());
    largest = static_cast<std::uint16_t>(missing < 0 ? largest - 1 : largest + 1);
  }
  return table;
}

void append_tables(const std::vector<AdaptiveTable>& tables, std::vector<std::uint8_t>& out) {
  for (const AdaptiveTable& table : tables) {
    out.push_back(table.first);
    out.push_back(table.last);
  }
  std::uint64_t bits = 0;
  unsigned num_bits = 0;
  for (const AdaptiveTable& table : tables) {
    for (std::size_t at = 0; at < stored_frequencies(table.first, table.last); ++at) {
      bits |= std::uint64_t{table.frequencies[table.first + at]} << num_bits;
      for (num_bits += kFrequencyBits; num_bits >= 8; num_bits -= 8, bits >>= 8) {
        out.push_back(static_cast<std::uint8_t>(bits));
      }
    }
  }
  if (num_bits > 0) {
    out.push_back(static_cast<std::uint8_t>(bits));
  }
  out.resize(round_up(out.size(), kAlignment));
}

std::size_t read_tables(ConstBytes bytes,
                        std::size_t num_tables,
                        std::vector<AdaptiveTable>& tables) {
  if (bytes.size() < 2 * num_tables) {
    return 0;
  }
  tables.assign(num_tables, AdaptiveTable{});
  std::size_t num_frequencies = 0;
  for (std::size_t index = 0; index < num_tables; ++index) {
    AdaptiveTable& table = tables[index];
    table.first = bytes.data()[2 * index];
    table.last = bytes.data()[2 * index + 1];
    if (table.first > table.last) {
      return 0;
    }
    num_frequencies += stored_frequencies(table.first, table.last);
  }
  const std::size_t nbytes = static_cast<std::size_t>(
      round_up(2 * num_tables + (kFrequencyBits * num_frequencies + 7) / 8, kAlignment));
  if (nbytes > bytes.size()) {
    return 0;
  }
  const std::uint8_t* at = bytes.data() + 2 * num_tables;
  std::uint32_t bits = 0;
  unsigned num_bits = 0;
  for (AdaptiveTable& table : tables) {
    const std::size_t stored = stored_frequencies(table.first, table.last);
    std::uint32_t total = 0;
    for (std::size_t index = 0; index < stored; ++index) {
      for (; num_bits < kFrequencyBits; num_bits += 8) {
        bits |= std::uint32_t{*at++} << num_bits;
      }
      const std::uint32_t frequency = bits & (kProbabilityTotal - 1);
      bits >>= kFrequencyBits;
      num_bits -= kFrequencyBits;
      table.frequencies[table.first + index] = static_cast<std::uint16_t>(frequency);
      total += frequency;
    }
    if (stored == 0) {
      table.frequencies[table.first] = kProbabilityTotal;
    } else if (total != kProbabilityTotal) {
      return 0;
    }
  }
  return nbytes;
}

std::vector<ReadEntry> read_pages(const std::vector<AdaptiveTable>& tables) {
  std::vector<ReadEntry> pages((tables.size() + 1) * kReadPage);
  ReadEntry* slot = pages.data();
  const auto add = [&slot](std::uint32_t symbol, std::uint32_t frequency) {
    const ReadEntry first = read_entry(symbol, frequency, 0);
    for (std::uint32_t bias = 0; bias < frequency; ++bias) {
      slot[bias] = first + (bias << kBiasShift);
    }
    slot += frequency;
  };
  for (const AdaptiveTable& table : tables) {
    for (std::uint32_t symbol = table.first; symbol <= table.last; ++symbol) {
      add(symbol, table.frequencies[symbol]);
    }
  }
  add(0, kProbabilityTotal);
  return pages;
}

std::vector<WriteEntry> write_pages(const std::vector<AdaptiveTable>& tables) {
  std::vector<WriteEntry> pages((tables.size() + 1) * kAdaptiveWritePage);
  for (std::size_t page = 0; page < tables.size(); ++page) {
    std::uint32_t start = 0;
    for (std::size_t symbol = 0; symbol < kAlphabet; ++symbol) {
      const std::uint32_t frequency = tables[page].frequencies[symbol];
      pages[page * kAdaptiveWritePage + symbol] = write_entry(frequency, start);
      start += frequency;
    }
  }
  pages[tables.size() * kAdaptiveWritePage] = write_entry(kProbabilityTotal, 0);
  return pages;
}

}  // namespace kv
