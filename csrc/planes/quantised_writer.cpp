// SPDX-License-Identifier: Apache-2.0
// The writer of quantised planes: parameters, scales, symbols, exceptions.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/endian.hpp"
#include "planes/element_loops.hpp"
#include "planes/elements.hpp"
#include "planes/quantised_plane.hpp"
#include "planes/scales.hpp"

namespace kv {
namespace {

// In-line parameters of section 9: what the coded tokens of this very block give.
PlaneParameters measure_parameters(const PlaneShape& shape,
                                   const SourceRows& source,
                                   std::size_t raw_rows) {
  const std::size_t dim = shape.dim;
  const float inverse_tokens = 1.0F / static_cast<float>(shape.tokens - raw_rows);
  const float inverse_dim = 1.0F / static_cast<float>(dim);
  const ElementLoops& loops = element_loops(shape.dtype);
  PlaneParameters parameters;
  parameters.log_rms.resize(shape.heads);
  parameters.mean.resize(shape.heads * dim);
  parameters.log_sigma.resize(shape.heads * dim);
  std::vector<float> values(dim);
  std::vector<float> sums(dim);
  for (std::size_t head = 0; head < shape.heads; ++head) {
    float* mean = parameters.mean.data() + head * dim;
    std::fill(sums.begin(), sums.end(), 0.0F);
    for (std::size_t token = raw_rows; token < shape.tokens; ++token) {
      loops.load(source.row(head, token), dim, values.data());
      for (std::size_t i = 0; i < dim; ++i) {
        sums[i] += values[i];
      }
    }
    for (std::size_t i = 0; i < dim; ++i) {
      mean[i] = BFloat16::load(BFloat16::store(sums[i] * inverse_tokens));
      mean[i] = std::isfinite(mean[i]) ? mean[i] : 0.0F;
    }
    std::fill(sums.begin(), sums.end(), 0.0F);
    for (std::size_t token = raw_rows; token < shape.tokens; ++token) {
      loops.load(source.row(head, token), dim, values.data());
      for (std::size_t i = 0; i < dim; ++i) {
        const float difference = values[i] - mean[i];
        sums[i] += difference * difference;
      }
    }
    for (float& sum : sums) {
      sum *= inverse_tokens;
    }
    const int log_rms = log_rms_of(sum16(sums.data(), dim) * inverse_dim, -kMaxStepCode);
    const int kept = std::min(std::max(log_rms, -kMaxStepCode), kMaxStepCode);
    parameters.log_rms[head] = static_cast<std::int16_t>(kept);
    for (std::size_t i = 0; i < dim; ++i) {
      const int log_sigma = log16(sums[i]) - 4 * kept;
      parameters.log_sigma[head * dim + i] =
          static_cast<std::int8_t>(std::min(std::max(log_sigma, -128), 127));
    }
  }
  return parameters;
}

// Everything that quantising one plane looks up, and what it makes.
class PlaneQuantiser {
 public:
  PlaneQuantiser(const PlaneShape& shape,
                 const QuantisedChoice& choice,
                 const PlaneParameters* parameters,
                 const PlaneEntry& entry,
                 const Scales& scales)
      : shape_(shape),
        choice_(choice),
        parameters_(parameters),
        entry_(entry),
        scales_(scales),
        grid_(shape.grid(choice.raw_rows, entry.segment_heads)),
        loops_(element_loops(shape.dtype)),
        offsets_(parameters, shape.heads, shape.dim),
        low_row_nbytes_((shape.dim + 7) / 8),
        lows_(std::size_t{entry.low_bits} * shape.heads * grid_.tokens * low_row_nbytes_),
        flags_(shape.dim),
        low_row_(round_up(shape.dim, 8)),
        state_(shape.dim),
        row_steps_(2 * shape.dim) {
    const std::size_t channels = shape.heads * shape.dim;
    first_ = classes_of(true, channels);
    rest_ = choice.transform.has_dpcm ? classes_of(false, channels) : first_;
    if (choice.transform.axis != StepAxis::kToken) {
      for (const int code :
           channel_codes(*parameters, choice.transform.axis, choice.mult, shape.dim)) {
        steps_.push_back(step_of(code));
        inverse_steps_.push_back(step_of(-code));
      }
    }
  }

  [[nodiscard]] const SegmentGrid& grid() const noexcept { return grid_; }
  [[nodiscard]] const std::vector<std::uint8_t>& lows() const noexcept { return lows_; }
  [[nodiscard]] const std::uint32_t* bases(const Segment& segment, bool is_first) const noexcept {
    return (is_first ? first_ : rest_).bases.data() + segment.first_head * grid_.padded_dim();
  }

  /// Fills symbols [tokens, heads, padded dim] of one segment and lists its exceptions.
  void quantise(const Segment& segment,
                const SourceRows& source,
                std::vector<std::uint8_t>& symbols,
                std::vector<std::uint8_t>& indices,
                std::vector<std::uint8_t>& bits) {
    const std::size_t padded = grid_.padded_dim();
    symbols.assign(segment.num_tokens * segment.num_heads * padded, 0);
    flagged_.clear();
    for (std::size_t at = 0; at < segment.num_heads; ++at) {
      const std::size_t head = segment.first_head + at;
      std::fill(state_.begin(), state_.end(), 0.0F);
      for (std::size_t token = 0; token < segment.num_tokens; ++token) {
        const std::size_t row = segment.first_token + token;
        const std::size_t entry = token * segment.num_heads + at;
        const std::uint8_t* elements = source.row(head, choice_.raw_rows + row);
        auto* to = reinterpret_cast<std::int8_t*>(symbols.data() + entry * padded);
        const ChannelClasses& classes = token == 0 ? first_ : rest_;
        if (loops_.quantise(QuantiseRow{elements, shape_.dim, transform(head, row),
                                        classes.radii.data() + head * shape_.dim, entry_.low_bits,
                                        to, low_row_.data(), flags_.data()})) {
          note_exceptions(entry, elements);
        }
        pack_lows(head, row);
      }
    }
    list_exceptions(indices, bits);
  }

 private:
  struct ChannelClasses {
    std::vector<float> radii;
    std::vector<std::uint32_t> bases;
  };
  struct Flagged {
    std::uint32_t index;
    std::uint32_t bits;
  };

  ChannelClasses classes_of(bool is_first, std::size_t channels) const {
    const std::vector<std::uint8_t> classes = channel_classes(
        parameters_, choice_.transform, choice_.mult, entry_.low_bits, channels, is_first);
    ChannelClasses found;
    for (const std::uint8_t each : classes) {
      found.radii.push_back(class_tables().radius[each]);
    }
    found.bases = lane_bases(classes.data(), shape_.heads, shape_.dim, kNullClass, kClassWritePage);
    return found;
  }

  RowTransform transform(std::size_t head, std::size_t row) noexcept {
    const std::size_t at = head * shape_.dim;
    RowTransform transform{};
    if (choice_.transform.axis == StepAxis::kToken) {
      const int scale = scales_.code(head, row, grid_.tokens);
      if (choice_.transform.has_dpcm || !offsets_.is_uniform(head)) {
        for (std::size_t i = 0; i < shape_.dim; ++i) {
          const int code = offsets_.code(scale, head, i);
          row_steps_[i] = step_of(code);
          row_steps_[shape_.dim + i] = step_of(-code);
        }
        transform.steps = row_steps_.data();
        transform.inverse_steps = row_steps_.data() + shape_.dim;
      } else {
        const int code = offsets_.code(scale, head, 0);
        transform.step = step_of(code);
        transform.inverse_step = step_of(-code);
      }
    } else {
      transform.steps = steps_.data() + at;
      transform.inverse_steps = inverse_steps_.data() + at;
    }
    transform.mean = choice_.transform.has_mean ? parameters_->mean.data() + at : nullptr;
    transform.rho = choice_.transform.has_dpcm ? parameters_->rho.data() + at : nullptr;
    transform.state = choice_.transform.has_dpcm ? state_.data() : nullptr;
    return transform;
  }

  void note_exceptions(std::size_t entry, const std::uint8_t* elements) {
    for (std::size_t i = 0; i < shape_.dim; ++i) {
      if (flags_[i] != 0) {
        const std::uint32_t bits = shape_.itemsize() == 2
                                       ? load_le<std::uint16_t>(elements + 2 * i)
                                       : load_le<std::uint32_t>(elements + 4 * i);
        flagged_.push_back(Flagged{static_cast<std::uint32_t>(entry * shape_.dim + i), bits});
      }
    }
  }

  void list_exceptions(std::vector<std::uint8_t>& indices, std::vector<std::uint8_t>& bits) {
    std::sort(flagged_.begin(), flagged_.end(),
              [](const Flagged& a, const Flagged& b) { return a.index < b.index; });
    indices.resize(2 * flagged_.size());
    bits.resize(shape_.itemsize() * flagged_.size());
    for (std::size_t at = 0; at < flagged_.size(); ++at) {
      store_le<std::uint16_t>(indices.data() + 2 * at,
                              static_cast<std::uint16_t>(flagged_[at].index));
      std::memcpy(bits.data() + shape_.itemsize() * at, &flagged_[at].bits, shape_.itemsize());
    }
  }

  void pack_lows(std::size_t head, std::size_t row) noexcept {
    std::uint8_t* to =
        lows_.data() + (head * grid_.tokens + row) * entry_.low_bits * low_row_nbytes_;
    for (unsigned bit = 0; bit < entry_.low_bits; ++bit) {
      for (std::size_t byte = 0; byte < low_row_nbytes_; ++byte) {
        // Gathers the lowest bits of eight bytes, the first one lowest.
        const std::uint64_t eight =
            load_le<std::uint64_t>(low_row_.data() + 8 * byte) >> bit & 0x0101010101010101U;
        *to++ = static_cast<std::uint8_t>(eight * 0x0102040810204080U >> 56);
      }
    }
  }

  const PlaneShape& shape_;
  const QuantisedChoice& choice_;
  const PlaneParameters* parameters_;
  const PlaneEntry& entry_;
  const Scales& scales_;
  SegmentGrid grid_;
  const ElementLoops& loops_;
  RowSteps offsets_;
  std::size_t low_row_nbytes_;
  std::vector<std::uint8_t> lows_;
  std::vector<std::uint8_t> flags_;
  std::vector<std::uint8_t> low_row_;
  std::vector<float> state_;
  std::vector<float> row_steps_;
  ChannelClasses first_;
  ChannelClasses rest_;
  std::vector<float> steps_;
  std::vector<float> inverse_steps_;
  std::vector<Flagged> flagged_;
};

// Codes the scale residuals that stand before a segment's rows: last of all, since writing goes
// backwards.
void write_scales(const Scales& scales,
                  const Segment& segment,
                  std::size_t tokens,
                  RansWriter& coder) {
  const std::size_t count = segment.num_heads * segment.num_tokens;
  const std::size_t groups = (count + kGroup - 1) / kGroup;
  std::vector<std::uint8_t> symbols(groups * kGroup);
  for (std::size_t head = 0; head < segment.num_heads; ++head) {
    std::memcpy(symbols.data() + head * segment.num_tokens,
                scales.offsets.data() + (segment.first_head + head) * tokens + segment.first_token,
                segment.num_tokens);
  }
  const std::vector<std::uint8_t> pages(count, scales.scale_class);
  const std::vector<std::uint32_t> bases =
      lane_bases(pages.data(), 1, count, kNullClass, kClassWritePage);
  coder.write_groups(symbols.data(), class_tables().write.data(), bases.data(), kClassWritePage - 1,
                     1, groups);
}

void write_segments(PlaneQuantiser& quantiser,
                    const Scales& scales,
                    std::size_t itemsize,
                    const std::vector<std::vector<std::uint8_t>>& symbols,
                    const std::vector<std::vector<std::uint8_t>>& indices,
                    const std::vector<std::vector<std::uint8_t>>& bits,
                    std::uint8_t* counts,
                    SectionWriter& writer) {
  const SegmentGrid& grid = quantiser.grid();
  const WriteEntry* table = class_tables().write.data();
  std::vector<std::uint8_t> scratch;
  for (std::size_t index = 0; index < grid.size() && !writer.is_full(); ++index) {
    const Segment segment = grid.at(index);
    const std::size_t groups = segment.num_heads * grid.head_groups();
    const std::size_t scale_room = 2 * round_up(segment.num_heads * segment.num_tokens, kGroup);
    scratch.resize(std::max(scratch.size(), 2 * symbols[index].size() + scale_room));
    RansWriter coder(Bytes(scratch.data(), scratch.size()));
    coder.write_groups(symbols[index].data() + groups * kGroup, table,
                       quantiser.bases(segment, false), kClassWritePage - 1, segment.num_tokens - 1,
                       groups);
    coder.write_groups(symbols[index].data(), table, quantiser.bases(segment, true),
                       kClassWritePage - 1, 1, groups);
    if (!scales.bases.empty() && scales.scale_class != kStoredScales) {
      write_scales(scales, segment, grid.tokens, coder);
    }
    writer.append(coder.states().data(), kStatesNbytes);
    writer.append(coder.words().data(), coder.words().size());
    writer.append(indices[index].data(), indices[index].size());
    writer.append(bits[index].data(), bits[index].size());
    writer.pad();
    store_le<std::uint32_t>(counts + 8 * index,
                            static_cast<std::uint32_t>(coder.words().size() / 2));
    store_le<std::uint32_t>(counts + 8 * index + 4,
                            static_cast<std::uint32_t>(bits[index].size() / itemsize));
  }
}

void write_scale_sections(const Scales& scales, SectionWriter& writer) {
  for (const std::int16_t base : scales.bases) {
    writer.append(&base, sizeof(base));
  }
  writer.pad();
  if (scales.scale_class == kStoredScales) {
    writer.append(scales.offsets.data(), scales.offsets.size());
    writer.pad();
  }
}

void write_raw_rows(const PlaneShape& shape,
                    const SourceRows& source,
                    std::size_t raw_rows,
                    SectionWriter& writer) {
  for (std::size_t head = 0; head < shape.heads; ++head) {
    for (std::size_t token = 0; token < raw_rows; ++token) {
      writer.append(source.row(head, token), shape.row_nbytes());
    }
  }
  writer.pad();
}

}  // namespace

std::size_t write_quantised_plane(const PlaneShape& shape,
                                  const QuantisedChoice& choice,
                                  const SourceRows& source,
                                  PlaneEntry& entry,
                                  Bytes room) {
  const std::size_t tokens = shape.tokens - choice.raw_rows;
  entry.coding = Coding::kQuantised;
  entry.transform = choice.transform.byte();
  entry.mult = static_cast<std::int8_t>(choice.mult);
  entry.low_bits = static_cast<std::uint8_t>(
      std::min(std::max((choice.mult - 16) >> 3, 0), static_cast<int>(kMaxLowBits)));
  entry.raw_rows = static_cast<std::uint8_t>(choice.raw_rows);
  entry.segment_heads = static_cast<std::uint16_t>(
      chosen_segment_heads(shape.heads, shape.dim, tokens, shape.segment_tokens));

  SectionWriter writer(room);
  PlaneParameters measured;
  const PlaneParameters* parameters = choice.parameters;
  if (choice.transform.source == ParameterSource::kInline) {
    measured = measure_parameters(shape, source, choice.raw_rows);
    parameters = &measured;
    if (std::uint8_t* to = writer.take(inline_parameters_nbytes(shape.heads, shape.dim))) {
      write_inline_parameters(measured, to);
    }
    writer.pad();
  }
  Scales scales;
  if (choice.transform.axis == StepAxis::kToken) {
    scales = choose_scales(shape, source, choice.raw_rows, choice.mult);
    entry.scale_class = scales.scale_class;
    write_scale_sections(scales, writer);
  }
  PlaneQuantiser quantiser(shape, choice, parameters, entry, scales);
  const std::size_t num_segments = quantiser.grid().size();
  std::uint8_t* counts = writer.take(8 * num_segments);
  write_raw_rows(shape, source, choice.raw_rows, writer);
  std::vector<std::vector<std::uint8_t>> symbols(num_segments);
  std::vector<std::vector<std::uint8_t>> indices(num_segments);
  std::vector<std::vector<std::uint8_t>> bits(num_segments);
  for (std::size_t index = 0; index < num_segments; ++index) {
    quantiser.quantise(quantiser.grid().at(index), source, symbols[index], indices[index],
                       bits[index]);
  }
  writer.append(quantiser.lows().data(), quantiser.lows().size());
  writer.pad();
  write_segments(quantiser, scales, shape.itemsize(), symbols, indices, bits, counts, writer);
  return writer.is_full() ? 0 : writer.nbytes();
}

}  // namespace kv
