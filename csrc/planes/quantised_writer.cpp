// SPDX-License-Identifier: Apache-2.0
// The writer of quantised planes: parameters, scales, symbols, exceptions.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/endian.hpp"
#include "elements/element_loops.hpp"
#include "elements/elements.hpp"
#include "planes/plane_quantiser.hpp"
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
                    const std::vector<QuantisedSegment>& segments,
                    std::uint8_t* counts,
                    SectionWriter& writer) {
  const SegmentGrid& grid = quantiser.grid();
  const WriteEntry* table = class_tables().write.data();
  std::vector<std::uint8_t> scratch;
  for (std::size_t index = 0; index < grid.size() && !writer.is_full(); ++index) {
    const Segment segment = grid.at(index);
    const QuantisedSegment& made = segments[index];
    const std::size_t groups = segment.num_heads * grid.head_groups();
    const std::size_t scale_room = 2 * round_up(segment.num_heads * segment.num_tokens, kGroup);
    scratch.resize(
        std::max(scratch.size(), 2 * made.symbols.size() + scale_room + RansWriter::kSpareNbytes));
    RansWriter coder(Bytes(scratch.data(), scratch.size()));
    coder.write_groups(made.symbols.data() + groups * kGroup, table,
                       quantiser.bases(segment, false), kClassWritePage - 1, segment.num_tokens - 1,
                       groups);
    coder.write_groups(made.symbols.data(), table, quantiser.bases(segment, true),
                       kClassWritePage - 1, 1, groups);
    if (!scales.bases.empty() && scales.scale_class != kStoredScales) {
      write_scales(scales, segment, grid.tokens, coder);
    }
    writer.append(coder.states().data(), kStatesNbytes);
    writer.append(coder.words().data(), coder.words().size());
    writer.append(made.indices.data(), made.indices.size());
    writer.append(made.bits.data(), made.bits.size());
    writer.pad();
    store_le<std::uint32_t>(counts + 8 * index,
                            static_cast<std::uint32_t>(coder.words().size() / 2));
    store_le<std::uint32_t>(counts + 8 * index + 4,
                            static_cast<std::uint32_t>(made.bits.size() / itemsize));
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
  if (choice.transform.is_inline()) {
    measured = measure_parameters(shape, source, choice.raw_rows);
    if (choice.transform.source == ParameterSource::kInlineWeighted) {
      derive_log_steps(measured);
    }
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
  std::vector<QuantisedSegment> segments;
  for (std::size_t index = 0; index < num_segments; ++index) {
    segments.push_back(quantiser.quantise(quantiser.grid().at(index), source));
  }
  writer.append(quantiser.lows().data(), quantiser.lows().size());
  writer.pad();
  write_segments(quantiser, scales, shape.itemsize(), segments, counts, writer);
  return writer.is_full() ? 0 : writer.nbytes();
}

}  // namespace kv
