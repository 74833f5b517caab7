// SPDX-License-Identifier: Apache-2.0
// Splits elements into exponents and low bytes, and merges them again.
#include "planes/exponent_plane.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/endian.hpp"
#include "elements/byte_split.hpp"
#include "entropy/adaptive_tables.hpp"
#include "planes/sections.hpp"

namespace kv {
namespace {

constexpr std::size_t kFewElements = 16384;
constexpr std::size_t kManyTables = 4;

// Symbols of the whole plane, [head][token][dim], without padding.
struct Exponents {
  std::vector<std::uint8_t> symbols;
  std::vector<std::uint8_t> lows;  // itemsize - 1 streams
};

Exponents split_plane(const PlaneShape& shape, const SourceRows& source) {
  const std::size_t count = shape.elements();
  const std::size_t itemsize = shape.itemsize();
  Exponents parts{std::vector<std::uint8_t>(count),
                  std::vector<std::uint8_t>(count * (itemsize - 1))};
  const bool is_dense = source.token_stride == static_cast<std::ptrdiff_t>(shape.row_nbytes());
  const std::size_t run = is_dense ? shape.tokens : 1;
  for (std::size_t head = 0; head < shape.heads; ++head) {
    for (std::size_t token = 0; token < shape.tokens; token += run) {
      const std::size_t at = (head * shape.tokens + token) * shape.dim;
      Streams streams{};
      for (std::size_t stream = 0; stream + 1 < itemsize; ++stream) {
        streams[stream] = parts.lows.data() + stream * count + at;
      }
      streams[itemsize - 1] = parts.symbols.data() + at;
      split_bytes(source.row(head, token), run * shape.dim, itemsize, streams);
    }
  }
  return parts;
}

// Sum of the symbols of each channel, [heads, dim].
std::vector<std::uint32_t> channel_sums(const PlaneShape& shape, const std::uint8_t* symbols) {
  std::vector<std::uint32_t> sums(shape.heads * shape.dim);
  for (std::size_t head = 0; head < shape.heads; ++head) {
    std::uint32_t* of_head = sums.data() + head * shape.dim;
    for (std::size_t token = 0; token < shape.tokens; ++token, symbols += shape.dim) {
      for (std::size_t channel = 0; channel < shape.dim; ++channel) {
        of_head[channel] += symbols[channel];
      }
    }
  }
  return sums;
}

// Section 9, exponent tables.
std::vector<std::uint8_t> choose_tables(const PlaneShape& shape, const std::uint8_t* symbols) {
  const std::vector<std::uint32_t> sums = channel_sums(shape, symbols);
  const std::uint64_t unit = shape.dtype == DType::kFloat16 ? 8 : 1;
  std::uint64_t total = 0;
  for (const std::uint32_t sum : sums) {
    total += sum;
  }
  const auto middle = static_cast<std::int64_t>(2 * total / (shape.tokens * unit * sums.size()));
  std::vector<std::uint8_t> chosen(sums.size());
  for (std::size_t channel = 0; channel < sums.size(); ++channel) {
    const auto key =
        static_cast<std::int64_t>(2 * std::uint64_t{sums[channel]} / (shape.tokens * unit));
    const std::int64_t wanted = key - middle + 2;
    chosen[channel] = static_cast<std::uint8_t>(
        std::min(std::max(wanted, std::int64_t{0}), static_cast<std::int64_t>(kManyTables) - 1));
  }
  return chosen;
}

std::vector<AdaptiveTable> count_tables(const PlaneShape& shape,
                                        const std::uint8_t* symbols,
                                        const std::vector<std::uint8_t>& chosen,
                                        std::size_t num_tables) {
  // Several sets of counters in turn: equal neighbours would wait for each other's increment.
  constexpr std::size_t kSets = 4;
  std::vector<std::array<std::uint32_t, kAlphabet>> counts(kSets * num_tables);
  std::vector<std::uint32_t*> counters(chosen.size());
  for (std::size_t channel = 0; channel < chosen.size(); ++channel) {
    counters[channel] = counts[channel % kSets * num_tables + chosen[channel]].data();
  }
  for (std::size_t head = 0; head < shape.heads; ++head) {
    std::uint32_t* const* of_head = counters.data() + head * shape.dim;
    for (std::size_t token = 0; token < shape.tokens; ++token, symbols += shape.dim) {
      for (std::size_t channel = 0; channel < shape.dim; ++channel) {
        ++of_head[channel][symbols[channel]];
      }
    }
  }
  std::vector<AdaptiveTable> tables(num_tables);
  for (std::size_t table = 0; table < num_tables; ++table) {
    for (std::size_t set = 1; set < kSets; ++set) {
      for (std::size_t symbol = 0; symbol < kAlphabet; ++symbol) {
        counts[table][symbol] += counts[set * num_tables + table][symbol];
      }
    }
    tables[table] = table_from(counts[table]);
  }
  return tables;
}

std::vector<std::uint8_t> table_sections(const std::vector<std::uint8_t>& chosen,
                                         const std::vector<AdaptiveTable>& tables) {
  std::vector<std::uint8_t> bytes(kSectionAlignment);
  bytes[0] = static_cast<std::uint8_t>(tables.size());
  if (tables.size() > 1) {
    bytes.resize(kSectionAlignment + round_up((chosen.size() + 1) / 2, kSectionAlignment));
    for (std::size_t channel = 0; channel < chosen.size(); ++channel) {
      std::uint8_t& both = bytes[kSectionAlignment + channel / 2];
      both = static_cast<std::uint8_t>(both | chosen[channel] << (channel % 2 * 4));
    }
  }
  append_tables(tables, bytes);
  return bytes;
}

// The segment's symbols, [token][head][padded dim].
void gather_segment(const PlaneShape& shape,
                    const SegmentGrid& grid,
                    const Segment& segment,
                    const std::uint8_t* symbols,
                    std::uint8_t* rows) {
  for (std::size_t token = 0; token < segment.num_tokens; ++token) {
    for (std::size_t head = 0; head < segment.num_heads; ++head, rows += grid.padded_dim()) {
      const std::size_t row =
          (segment.first_head + head) * shape.tokens + segment.first_token + token;
      std::memcpy(rows, symbols + row * shape.dim, shape.dim);
    }
  }
}

class ExponentReader final : public PlaneReader {
 public:
  ExponentReader(std::size_t plane,
                 const PlaneShape& shape,
                 const PlaneEntry& entry,
                 ConstBytes stored)
      : PlaneReader(plane, shape, shape.grid(0, entry.segment_heads)) {
    ExponentSections found = find_exponent_sections(plane, shape, entry, stored);
    lows_ = found.lows;
    segments_ = std::move(found.segments);
    pages_ = read_pages(found.tables);
    bases_ =
        lane_bases(found.chosen.data(), shape.heads, shape.dim, found.tables.size(), kReadPage);
  }

  void write_raw_rows(const WindowTarget&) const override {}

  [[nodiscard]] const ReadEntry* table() const noexcept override { return pages_.data(); }

  [[nodiscard]] const std::uint32_t* bases(const Segment& segment, bool) const override {
    return bases_.data() + segment.first_head * grid().padded_dim();
  }

  void begin(std::size_t index, RansReader& reader, SegmentState&) const override {
    const ConstBytes segment = segments_[index];
    reader.open(segment.sub(0, kStatesNbytes),
                segment.sub(kStatesNbytes, segment.size() - kStatesNbytes));
  }

  void write_rows(const Segment& segment,
                  std::size_t first_row,
                  std::size_t rows,
                  const std::uint8_t* symbols,
                  SegmentState&,
                  const WindowTarget& target) const override {
    const Window& window = target.window;
    const std::size_t begin = segment.first_token + first_row;
    const std::size_t first = std::max(begin, window.first_token);
    const std::size_t end = std::min(begin + rows, window.first_token + window.num_tokens);
    const std::size_t itemsize = shape().itemsize();
    for (std::size_t at = 0; at < segment.num_heads && first < end; ++at) {
      const std::size_t head = segment.first_head + at;
      if (head - window.first_head >= window.num_heads) {
        continue;
      }
      MergeRows merge{};
      merge.low_stride = shape().dim;
      merge.high_stride = segment.num_heads * grid().padded_dim();
      const std::size_t offset = (head * shape().tokens + first) * shape().dim;
      for (std::size_t stream = 0; stream + 1 < itemsize; ++stream) {
        merge.streams[stream] = lows_ + stream * shape().elements() + offset;
      }
      merge.streams[itemsize - 1] =
          symbols + (first - begin) * merge.high_stride + at * grid().padded_dim();
      merge.count = shape().dim;
      merge.itemsize = itemsize;
      merge.rows = end - first;
      merge.target = target.row(head, first);
      merge.target_stride = target.rows.token_stride;
      merge_rows(merge);
    }
  }

  void end(std::size_t, const WindowTarget&) const override {}

 private:
  const std::uint8_t* lows_ = nullptr;
  std::vector<ConstBytes> segments_;
  std::vector<ReadEntry> pages_;
  std::vector<std::uint32_t> bases_;
};

}  // namespace

std::size_t write_exponent_plane(
    const PlaneShape& shape, bool is_key, const SourceRows& source, PlaneEntry& entry, Bytes room) {
  entry.coding = Coding::kExponent;
  entry.segment_heads = static_cast<std::uint16_t>(
      chosen_segment_heads(shape.heads, shape.dim, shape.tokens, shape.segment_tokens));
  const SegmentGrid grid = shape.grid(0, entry.segment_heads);
  const Exponents parts = split_plane(shape, source);
  const bool is_split = is_key && shape.elements() >= kFewElements;
  const std::vector<std::uint8_t> chosen = is_split
                                               ? choose_tables(shape, parts.symbols.data())
                                               : std::vector<std::uint8_t>(shape.heads * shape.dim);
  const std::vector<AdaptiveTable> tables =
      count_tables(shape, parts.symbols.data(), chosen, is_split ? kManyTables : 1);

  SectionWriter writer(room);
  const std::vector<std::uint8_t> sections = table_sections(chosen, tables);
  writer.append(sections.data(), sections.size());
  std::uint8_t* words = writer.take(grid.size() * sizeof(std::uint32_t));
  writer.append(parts.lows.data(), parts.lows.size());
  writer.pad();
  const std::vector<WriteEntry> pages = write_pages(tables);
  const std::vector<std::uint32_t> bases =
      lane_bases(chosen.data(), grid.heads, grid.dim, tables.size(), kAdaptiveWritePage);
  std::vector<std::uint8_t> rows;
  std::vector<std::uint8_t> scratch;
  for (std::size_t index = 0; index < grid.size() && !writer.is_full(); ++index) {
    const Segment segment = grid.at(index);
    const std::size_t symbols = segment.num_tokens * segment.num_heads * grid.padded_dim();
    rows.assign(symbols, 0);
    scratch.resize(std::max(scratch.size(), 2 * symbols + RansWriter::kSpareNbytes));
    gather_segment(shape, grid, segment, parts.symbols.data(), rows.data());
    RansWriter coder(Bytes(scratch.data(), scratch.size()));
    coder.write_groups(rows.data(), pages.data(),
                       bases.data() + segment.first_head * grid.padded_dim(), 0xFF,
                       segment.num_tokens, segment.num_heads * grid.head_groups());
    writer.append(coder.states().data(), kStatesNbytes);
    writer.append(coder.words().data(), coder.words().size());
    writer.pad();
    store_le<std::uint32_t>(words + 4 * index,
                            static_cast<std::uint32_t>(coder.words().size() / 2));
  }
  return writer.is_full() ? 0 : writer.nbytes();
}

std::unique_ptr<PlaneReader> open_exponent_plane(std::size_t plane,
                                                 const PlaneShape& shape,
                                                 const PlaneEntry& entry,
                                                 ConstBytes stored) {
  return std::make_unique<ExponentReader>(plane, shape, entry, stored);
}

}  // namespace kv
