// SPDX-License-Identifier: Apache-2.0
// The writer of groups: weighted elements, their components, and which tokens are better exact.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "basis/basis_plane.hpp"
#include "core/endian.hpp"
#include "elements/element_loops.hpp"
#include "elements/elements.hpp"
#include "planes/scales.hpp"

namespace kv {
namespace {

// Mean square of what a token may be off, in steps: one and a half times what rounding every
// channel would give. More says that the basis does not know such tokens.
constexpr float kMaxSquare = 0.125F;
constexpr float kLargestSymbol = 32767.0F;

// Makes the symbols of a group's tokens.
class GroupQuantiser {
 public:
  GroupQuantiser(const GroupShape& shape,
                 int mult,
                 std::size_t raw_rows,
                 const std::vector<SourceRows>& sources)
      : shape_(shape),
        basis_(*shape.basis),
        sources_(sources),
        loops_(basis_loops(shape.dtype)),
        weights_(shape, mult),
        symbols_(shape.tokens * basis_.runs() * kGroup),
        is_exact_(shape.tokens),
        weighted_(basis_.channels() * kTokenTile),
        components_(basis_.rank * kTokenTile),
        row_(basis_.dim),
        squares_(basis_.dim),
        room_(2 * basis_.dim) {
    std::fill(is_exact_.begin(), is_exact_.begin() + static_cast<std::ptrdiff_t>(raw_rows), true);
    for (std::size_t first = 0; first < shape.tokens; first += kTokenTile) {
      quantise(first, std::min(kTokenTile, shape.tokens - first));
    }
    for (std::size_t token = 0; token < shape.tokens; ++token) {
      if (is_exact_[token]) {
        exact_.push_back(token);
        std::fill_n(of_token(token), basis_.runs() * kGroup, std::int16_t{0});
      }
    }
  }

  /// [tokens, runs, 64].
  [[nodiscard]] const std::vector<std::int16_t>& symbols() const noexcept { return symbols_; }
  [[nodiscard]] const std::vector<std::size_t>& exact() const noexcept { return exact_; }

 private:
  [[nodiscard]] std::int16_t* of_token(std::size_t token) noexcept {
    return symbols_.data() + token * basis_.runs() * kGroup;
  }
  [[nodiscard]] const std::uint8_t* source(std::size_t row, std::size_t token) const noexcept {
    return sources_[row / basis_.heads].row(row % basis_.heads, token);
  }
  [[nodiscard]] int scale_of(std::size_t row, std::size_t token) noexcept {
    return basis_.has_scales() ? of_token(token)[basis_.rank + row] : 0;
  }

  void quantise(std::size_t first, std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
      choose_scales_of(first + at);
      weigh(first + at, at);
    }
    loops_.forward(ForwardSums{weighted_.data(), basis_.components.data(), basis_.rows(),
                               basis_.rank, basis_.dim, components_.data()});
    for (std::size_t at = 0; at < count; ++at) {
      if (!is_exact_[first + at] && !(round(first + at, at) && is_close(first + at))) {
        is_exact_[first + at] = true;
      }
    }
  }

  void choose_scales_of(std::size_t token) {
    const ElementLoops& elements = element_loops(shape_.dtype);
    const float inverse_dim = 1.0F / static_cast<float>(basis_.dim);
    for (std::size_t row = 0; basis_.has_scales() && row < basis_.rows(); ++row) {
      const int base = basis_.scale_base[row];
      const float energy = elements.energy(source(row, token), basis_.dim) * inverse_dim;
      const int over = log_rms_of(energy, base) - base;
      of_token(token)[basis_.rank + row] =
          static_cast<std::int16_t>((over + kScaleUnit / 2) >> kScaleShift);
    }
  }

  void weigh(std::size_t token, std::size_t at) {
    for (std::size_t row = 0; row < basis_.rows(); ++row) {
      const RowWeights weights = weights_.of_row(row, scale_of(row, token), room_.data());
      if (loops_.weigh(source(row, token), weights, row_.data())) {
        is_exact_[token] = true;
      }
      float* to = weighted_.data() + row * basis_.dim * kTokenTile + at;
      for (std::size_t i = 0; i < basis_.dim; ++i) {
        to[i * kTokenTile] = row_[i];
      }
    }
  }

  // Returns false when a component has no symbol.
  bool round(std::size_t token, std::size_t at) {
    std::int16_t* symbols = of_token(token);
    numbers_.clear();
    values_.clear();
    for (std::size_t k = 0; k < basis_.rank; ++k) {
      const float component = components_[k * kTokenTile + at];
      if (!(std::fabs(component) <= kLargestSymbol)) {
        return false;
      }
      const float rounded = nearest(component);
      symbols[k] = static_cast<std::int16_t>(rounded);
      if (rounded != 0.0F) {
        numbers_.push_back(static_cast<std::uint32_t>(k));
        values_.push_back(rounded);
      }
    }
    return true;
  }

  // True when a reader makes something near enough of the symbols.
  bool is_close(std::size_t token) {
    float sum = 0.0F;
    for (std::size_t row = 0; row < basis_.rows(); ++row) {
      const std::uint16_t* components = basis_.components.data() + row * basis_.rank * basis_.dim;
      loops_.inverse(InverseSums{numbers_.data(), values_.data(), values_.size(), components,
                                 basis_.dim, row_.data()});
      const RowWeights weights = weights_.of_row(row, scale_of(row, token), room_.data());
      if (loops_.compare(row_.data(), weights, source(row, token), squares_.data())) {
        return false;
      }
      sum += sum16(squares_.data(), basis_.dim);
    }
    return sum <= kMaxSquare * static_cast<float>(basis_.channels());
  }

  const GroupShape& shape_;
  const Basis& basis_;
  const std::vector<SourceRows>& sources_;
  const BasisLoops& loops_;
  GroupWeights weights_;
  std::vector<std::int16_t> symbols_;
  std::vector<bool> is_exact_;
  std::vector<std::size_t> exact_;
  std::vector<float> weighted_;    // [layers, heads, dim, tile]
  std::vector<float> components_;  // [rank, tile]
  std::vector<float> row_;
  std::vector<float> squares_;
  std::vector<float> room_;
  std::vector<std::uint32_t> numbers_;
  std::vector<float> values_;
};

// The symbols of one segment, as the coder and the list of exceptions take them.
struct CutSegment {
  std::vector<std::uint8_t> symbols;  // [tokens, runs of the segment, 64]
  std::vector<std::uint16_t> indices;
  std::vector<std::int16_t> values;
};

CutSegment cut_segment(const Segment& segment,
                       const GroupQuantiser& quantiser,
                       const std::vector<std::uint8_t>& classes) {
  const std::size_t row = segment.num_heads * kGroup;
  const std::size_t first = segment.first_head * kGroup;
  CutSegment cut;
  cut.symbols.resize(segment.num_tokens * row);
  for (std::size_t token = 0; token < segment.num_tokens; ++token) {
    const std::int16_t* from =
        quantiser.symbols().data() + (segment.first_token + token) * classes.size() + first;
    for (std::size_t at = 0; at < row; ++at) {
      const std::uint8_t page = classes[first + at];
      const int radius = page == kNullClass ? 0 : class_tables().radius[page];
      const int kept = std::clamp<int>(from[at], -radius, radius);
      cut.symbols[token * row + at] = static_cast<std::uint8_t>(kept);
      if (kept != from[at]) {
        cut.indices.push_back(static_cast<std::uint16_t>(token * row + at));
        cut.values.push_back(from[at]);
      }
    }
  }
  return cut;
}

void write_segments(const SegmentGrid& grid,
                    const GroupQuantiser& quantiser,
                    const std::vector<std::uint8_t>& classes,
                    std::uint8_t* counts,
                    SectionWriter& writer) {
  const std::vector<std::uint32_t> bases =
      lane_bases(classes.data(), grid.heads, kGroup, kNullClass, kClassWritePage);
  std::vector<std::uint8_t> scratch;
  for (std::size_t index = 0; index < grid.size() && !writer.is_full(); ++index) {
    const Segment segment = grid.at(index);
    const CutSegment cut = cut_segment(segment, quantiser, classes);
    scratch.resize(std::max(scratch.size(), 2 * cut.symbols.size() + RansWriter::kSpareNbytes));
    RansWriter coder(Bytes(scratch.data(), scratch.size()));
    coder.write_groups(cut.symbols.data(), class_tables().write.data(),
                       bases.data() + segment.first_head * kGroup, kClassWritePage - 1,
                       segment.num_tokens, segment.num_heads);
    writer.append(coder.states().data(), kStatesNbytes);
    writer.append(coder.words().data(), coder.words().size());
    writer.append(cut.indices.data(), 2 * cut.indices.size());
    writer.append(cut.values.data(), 2 * cut.values.size());
    writer.pad();
    store_le<std::uint32_t>(counts + 8 * index,
                            static_cast<std::uint32_t>(coder.words().size() / 2));
    store_le<std::uint32_t>(counts + 8 * index + 4, static_cast<std::uint32_t>(cut.indices.size()));
  }
}

}  // namespace

std::size_t write_basis_group(const GroupShape& shape,
                              int mult,
                              std::size_t raw_rows,
                              const std::vector<SourceRows>& sources,
                              PlaneEntry& entry,
                              Bytes room) {
  const Basis& basis = *shape.basis;
  entry.coding = Coding::kBasis;
  entry.mult = static_cast<std::int8_t>(mult);
  entry.segment_heads = static_cast<std::uint16_t>(
      chosen_segment_runs(basis.runs(), shape.tokens, shape.segment_tokens));
  const SegmentGrid grid = shape.symbols().grid(0, entry.segment_heads);
  const GroupQuantiser quantiser(shape, mult, raw_rows, sources);
  const std::vector<std::size_t>& exact = quantiser.exact();

  SectionWriter writer(room);
  const std::uint16_t head[] = {static_cast<std::uint16_t>(exact.size()), 0};
  writer.append(head, sizeof(head));
  for (const std::size_t token : exact) {
    const auto stored = static_cast<std::uint16_t>(token);
    writer.append(&stored, sizeof(stored));
  }
  writer.pad();
  std::uint8_t* counts = writer.take(8 * grid.size());
  for (std::size_t row = 0; row < basis.rows(); ++row) {
    for (const std::size_t token : exact) {
      writer.append(sources[row / basis.heads].row(row % basis.heads, token), shape.row_nbytes());
    }
  }
  writer.pad();
  write_segments(grid, quantiser, basis.classes(mult), counts, writer);
  return writer.is_full() ? 0 : writer.nbytes();
}

}  // namespace kv
