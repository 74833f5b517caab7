// SPDX-License-Identifier: Apache-2.0
// The reader of groups: symbols first, then the sums of the rows that are wanted.
#include <algorithm>
#include <cstring>
#include <string>

#include "basis/basis_plane.hpp"
#include "core/endian.hpp"
#include "planes/sections.hpp"

namespace kv {
namespace {

// Where a group's sections lie; pointers are into the stored bytes.
struct GroupSections {
  std::vector<std::size_t> exact;      // tokens, ascending
  const std::uint8_t* rows = nullptr;  // [layers, heads, exact tokens, dim]
  std::vector<StoredSegment> segments;
};

GroupSections find_group_sections(const GroupShape& shape,
                                  const SegmentGrid& grid,
                                  ConstBytes stored) {
  const std::size_t plane = shape.first_plane;
  SectionWalk walk(plane, stored);
  GroupSections found;
  const std::size_t num_exact = load_le<std::uint16_t>(walk.take(kSectionAlignment).data());
  const std::uint8_t* tokens = walk.take(2 * num_exact).data();
  std::size_t smallest = 0;
  for (std::size_t at = 0; at < num_exact; ++at) {
    const std::size_t token = load_le<std::uint16_t>(tokens + 2 * at);
    KV_EXPECT(token >= smallest && token < shape.tokens, CorruptRecord,
              plane_name(plane) + " has an exact token out of place");
    smallest = token + 1;
    found.exact.push_back(token);
  }
  const std::uint8_t* counts = walk.take(8 * grid.size()).data();
  found.rows =
      walk.take(std::uint64_t{shape.basis->rows()} * num_exact * shape.row_nbytes()).data();
  found.segments.reserve(grid.size());
  for (std::size_t index = 0; index < grid.size(); ++index) {
    const std::uint64_t words = std::uint64_t{2} * load_le<std::uint32_t>(counts + 8 * index);
    const std::uint64_t exceptions = load_le<std::uint32_t>(counts + 8 * index + 4);
    const ConstBytes bytes = walk.take(kStatesNbytes + words + 4 * exceptions);
    const std::uint8_t* indices = bytes.data() + kStatesNbytes + words;
    found.segments.push_back(
        StoredSegment{bytes.sub(0, kStatesNbytes), bytes.sub(kStatesNbytes, words), indices,
                      indices + 2 * exceptions, static_cast<std::size_t>(exceptions)});
  }
  walk.expect_end();
  return found;
}

// The symbols as a plane of their own, [runs, tokens, 64] of i16.
class SymbolReader final : public PlaneReader {
 public:
  SymbolReader(const GroupShape& shape,
               const PlaneEntry& entry,
               const std::vector<StoredSegment>& segments)
      : PlaneReader(
            shape.first_plane, shape.symbols(), shape.symbols().grid(0, entry.segment_heads)),
        segments_(segments),
        entries_(shape.basis->entries()),
        bases_(lane_bases(
            shape.basis->classes(entry.mult).data(), grid().heads, kGroup, kNullClass, kReadPage)) {
  }

  void write_raw_rows(const WindowTarget&) const override {}
  [[nodiscard]] const ReadEntry* table() const noexcept override {
    return class_tables().read.data();
  }
  [[nodiscard]] const std::uint32_t* bases(const Segment& segment, bool) const override {
    return bases_.data() + segment.first_head * kGroup;
  }
  void begin(std::size_t index, RansReader& reader, SegmentState&) const override {
    reader.open(segments_[index].states, segments_[index].words);
  }

  void write_rows(const Segment& segment,
                  std::size_t first_row,
                  std::size_t rows,
                  const std::uint8_t* symbols,
                  SegmentState&,
                  const WindowTarget& target) const override {
    for (std::size_t at = 0; at < rows; ++at) {
      const std::size_t token = segment.first_token + first_row + at;
      if (target.window.has(segment.first_head, token)) {
        const auto* from =
            reinterpret_cast<const std::int8_t*>(symbols + at * segment.num_heads * kGroup);
        auto* to = reinterpret_cast<std::int16_t*>(target.row(segment.first_head, token));
        std::copy(from, from + segment.num_heads * kGroup, to);
      }
    }
  }

  void end(std::size_t index, const WindowTarget& target) const override {
    const StoredSegment& stored = segments_[index];
    const Segment segment = grid().at(index);
    const std::size_t row = segment.num_heads * kGroup;
    std::size_t smallest = 0;
    for (std::size_t at = 0; at < stored.num_exceptions; ++at) {
      const std::size_t found = load_le<std::uint16_t>(stored.indices + 2 * at);
      const std::size_t entry = segment.first_head * kGroup + found % row;
      KV_EXPECT(found >= smallest && found < segment.num_tokens * row && entry < entries_,
                CorruptRecord,
                "segment " + std::to_string(index) + " of " + plane_name(plane()) +
                    " has an exception out of place");
      smallest = found + 1;
      const std::size_t token = segment.first_token + found / row;
      if (target.window.has(0, token)) {
        std::memcpy(target.row(0, token) + 2 * entry, stored.bits + 2 * at, 2);
      }
    }
  }

 private:
  const std::vector<StoredSegment>& segments_;
  std::size_t entries_;
  std::vector<std::uint32_t> bases_;
};

class GroupReader final : public BasisReader {
 public:
  GroupReader(const GroupShape& shape,
              const PlaneEntry& entry,
              ConstBytes stored,
              const Window& window)
      : shape_(shape),
        window_(window),
        weights_(shape_, entry.mult),
        sections_(
            find_group_sections(shape_, shape_.symbols().grid(0, entry.segment_heads), stored)),
        reader_(shape_, entry, sections_.segments),
        symbols_(window.num_tokens * shape_.basis->runs() * kGroup) {}

  [[nodiscard]] PlaneJob job() override {
    const auto stride = static_cast<std::ptrdiff_t>(2 * shape_.basis->runs() * kGroup);
    return PlaneJob{&reader_,
                    {{0, shape_.basis->runs(), window_.first_token, window_.num_tokens},
                     {reinterpret_cast<std::uint8_t*>(symbols_.data()), 2 * kGroup, stride}}};
  }

  void gather() override {
    const std::size_t rank = shape_.basis->rank;
    starts_.assign(1, 0);
    numbers_.clear();
    values_.clear();
    for (std::size_t token = 0; token < window_.num_tokens; ++token) {
      const std::int16_t* symbols = of_token(token);
      for (std::size_t k = 0; k < rank; ++k) {
        if (symbols[k] != 0) {
          numbers_.push_back(static_cast<std::uint32_t>(k));
          values_.push_back(static_cast<float>(symbols[k]));
        }
      }
      starts_.push_back(numbers_.size());
    }
  }

  void restore(std::size_t layer, const TargetRows& target) const override {
    const Basis& basis = *shape_.basis;
    const BasisLoops& loops = basis_loops(shape_.dtype);
    std::vector<float> sums(basis.dim);
    std::vector<float> room(2 * basis.dim);
    for (std::size_t at = 0; at < window_.num_heads; ++at) {
      const std::size_t row = layer * basis.heads + window_.first_head + at;
      const std::uint16_t* components = basis.components.data() + row * basis.rank * basis.dim;
      for (std::size_t token = 0; token < window_.num_tokens; ++token) {
        const std::size_t first = starts_[token];
        loops.inverse(InverseSums{numbers_.data() + first, values_.data() + first,
                                  starts_[token + 1] - first, components, basis.dim, sums.data()});
        const int scale = basis.has_scales() ? of_token(token)[basis.rank + row] : 0;
        loops.restore(sums.data(), weights_.of_row(row, scale, room.data()), target.row(at, token));
      }
      for (std::size_t exact = 0; exact < sections_.exact.size(); ++exact) {
        const std::size_t token = sections_.exact[exact] - window_.first_token;
        if (token < window_.num_tokens) {
          std::memcpy(target.row(at, token),
                      sections_.rows + (row * sections_.exact.size() + exact) * shape_.row_nbytes(),
                      shape_.row_nbytes());
        }
      }
    }
  }

 private:
  [[nodiscard]] const std::int16_t* of_token(std::size_t token) const noexcept {
    return symbols_.data() + token * shape_.basis->runs() * kGroup;
  }

  GroupShape shape_;
  Window window_;
  GroupWeights weights_;
  GroupSections sections_;
  SymbolReader reader_;
  std::vector<std::int16_t> symbols_;  // [wanted tokens, runs, 64]
  // The components of wanted tokens that are not zero, token after token.
  std::vector<std::size_t> starts_;
  std::vector<std::uint32_t> numbers_;
  std::vector<float> values_;
};

}  // namespace

std::unique_ptr<BasisReader> open_basis_group(const GroupShape& shape,
                                              const PlaneEntry& entry,
                                              ConstBytes stored,
                                              const Window& window) {
  KV_EXPECT(shape.symbols().grid(0, entry.segment_heads).is_valid(), CorruptRecord,
            plane_name(shape.first_plane) + " has segments that its basis does not allow");
  return std::make_unique<GroupReader>(shape, entry, stored, window);
}

}  // namespace kv
