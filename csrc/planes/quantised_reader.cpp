// SPDX-License-Identifier: Apache-2.0
// The reader of quantised planes.
#include <algorithm>
#include <cstring>

#include "core/endian.hpp"
#include "elements/element_loops.hpp"
#include "elements/low_bits.hpp"
#include "planes/channel_tables.hpp"
#include "planes/quantised_plane.hpp"
#include "planes/sections.hpp"

namespace kv {
namespace {

class QuantisedReader final : public PlaneReader {
 public:
  QuantisedReader(std::size_t plane,
                  const PlaneShape& shape,
                  const PlaneEntry& entry,
                  const PlaneParameters* calibrated,
                  ConstBytes stored)
      : PlaneReader(plane, shape, shape.grid(entry.raw_rows, entry.segment_heads)),
        entry_(entry),
        transform_(Transform::from(entry.transform)),
        parameters_(transform_.source == ParameterSource::kCalibration ? calibrated : nullptr),
        loops_(element_loops(shape.dtype)),
        offsets_(parameters_, shape.heads, shape.dim) {
    KV_EXPECT(transform_.source != ParameterSource::kCalibration || calibrated != nullptr,
              ShapeError, plane_name(plane) + " needs the calibration it was written with");
    sections_ = find_quantised_sections(plane, shape, entry, stored);
    if (transform_.is_inline()) {
      parameters_ = &sections_.inline_parameters;
    }
    tables_ = channel_tables(shape, entry, parameters_);
  }

  [[nodiscard]] std::size_t raw_rows() const noexcept override { return entry_.raw_rows; }

  void write_raw_rows(const WindowTarget& target) const override {
    const Window& window = target.window;
    const std::size_t end =
        std::min<std::size_t>(window.first_token + window.num_tokens, raw_rows());
    for (std::size_t at = 0; at < window.num_heads; ++at) {
      const std::size_t head = window.first_head + at;
      for (std::size_t token = window.first_token; token < end; ++token) {
        std::memcpy(target.row(head, token),
                    sections_.raw + (head * raw_rows() + token) * shape().row_nbytes(),
                    shape().row_nbytes());
      }
    }
  }

  [[nodiscard]] const ReadEntry* table() const noexcept override {
    return class_tables().read.data();
  }

  [[nodiscard]] const std::uint32_t* bases(const Segment& segment, bool is_first) const override {
    const bool has_rest = !is_first && !tables_->rest_bases.empty();
    return (has_rest ? tables_->rest_bases : tables_->first_bases).data() +
           segment.first_head * grid().padded_dim();
  }

  void begin(std::size_t index, RansReader& reader, SegmentState& state) const override {
    const Segment segment = grid().at(index);
    reader.open(sections_.segments[index].states, sections_.segments[index].words);
    if (transform_.has_dpcm) {
      state.rebuilt.assign(segment.num_heads * shape().dim, 0.0F);
    }
    if (transform_.axis == StepAxis::kToken) {
      read_scales(segment, reader, state.scales);
      state.steps.resize(state.scales.size());
      const int* scale = state.scales.data();
      float* step = state.steps.data();
      for (std::size_t at = 0; at < segment.num_heads; ++at) {
        for (std::size_t row = 0; row < segment.num_tokens; ++row) {
          *step++ = step_of(offsets_.code(*scale++, segment.first_head + at, 0));
        }
      }
      state.row_steps.resize(shape().dim);
    }
  }

  void write_rows(const Segment& segment,
                  std::size_t first_row,
                  std::size_t rows,
                  const std::uint8_t* symbols,
                  SegmentState& state,
                  const WindowTarget& target) const override {
    const Window& window = target.window;
    // Rows in [wanted, wanted_end) of the segment go to the target.
    const std::size_t first_token = raw_rows() + segment.first_token;
    const std::size_t end = first_row + rows;
    const std::size_t before = std::max(window.first_token, first_token) - first_token;
    const std::size_t window_end = window.first_token + window.num_tokens;
    const std::size_t after = window_end > first_token ? window_end - first_token : 0;
    const std::size_t wanted = std::min(std::max(before, first_row), end);
    const std::size_t wanted_end = std::max(std::min(after, end), wanted);
    const std::size_t stride = segment.num_heads * grid().padded_dim();
    for (std::size_t at = 0; at < segment.num_heads; ++at, symbols += grid().padded_dim()) {
      const std::size_t head = segment.first_head + at;
      if (head - window.first_head >= window.num_heads) {
        continue;
      }
      if (transform_.has_dpcm && wanted > first_row) {
        // Nobody wants these rows, but those after them follow from them.
        state.discarded.resize(shape().row_nbytes());
        restore(segment, at, first_row, wanted - first_row, symbols, stride, state,
                state.discarded.data(), 0);
      }
      if (wanted_end > wanted) {
        restore(segment, at, wanted, wanted_end - wanted, symbols + (wanted - first_row) * stride,
                stride, state, target.row(head, first_token + wanted), target.rows.token_stride);
      }
    }
  }

  void end(std::size_t index, const WindowTarget& target) const override {
    const StoredSegment& stored = sections_.segments[index];
    const Segment segment = grid().at(index);
    const std::size_t total = segment.num_tokens * segment.num_heads * shape().dim;
    std::size_t smallest = 0;
    for (std::size_t at = 0; at < stored.num_exceptions; ++at) {
      const std::size_t found = load_le<std::uint16_t>(stored.indices + 2 * at);
      KV_EXPECT(found >= smallest && found < total, CorruptRecord,
                "segment " + std::to_string(index) + " of " + plane_name(plane()) +
                    " has an exception out of place");
      smallest = found + 1;
      const std::size_t entry = found / shape().dim;
      const std::size_t head = segment.first_head + entry % segment.num_heads;
      const std::size_t token = raw_rows() + segment.first_token + entry / segment.num_heads;
      if (target.window.has(head, token)) {
        std::memcpy(target.row(head, token) + found % shape().dim * shape().itemsize(),
                    stored.bits + at * shape().itemsize(), shape().itemsize());
      }
    }
  }

 private:
  [[nodiscard]] int scale_base(std::size_t head) const noexcept {
    return load_le<std::int16_t>(sections_.scale_bases + 2 * head);
  }

  void read_scales(const Segment& segment, RansReader& reader, std::vector<int>& scales) const {
    const std::size_t count = segment.num_heads * segment.num_tokens;
    scales.resize(count);
    if (entry_.scale_class == kStoredScales) {
      for (std::size_t at = 0; at < count; ++at) {
        const std::size_t head = segment.first_head + at / segment.num_tokens;
        const std::size_t row = segment.first_token + at % segment.num_tokens;
        scales[at] = scale_base(head) + sections_.scales[head * grid().tokens + row];
      }
      return;
    }
    const std::size_t groups = (count + kGroup - 1) / kGroup;
    const std::vector<std::uint8_t> pages(count, entry_.scale_class);
    const std::vector<std::uint32_t> bases =
        lane_bases(pages.data(), 1, count, kNullClass, kReadPage);
    std::vector<std::uint8_t> residuals(groups * kGroup);
    const ReadJob job{&reader, table(), bases.data(), residuals.data()};
    read_groups(&job, 1, 1, groups);
    const std::uint8_t* residual = residuals.data();
    int* scale = scales.data();
    for (std::size_t at = 0; at < segment.num_heads; ++at) {
      const int base = scale_base(segment.first_head + at);
      for (std::size_t row = 0; row < segment.num_tokens; ++row) {
        *scale++ = base + static_cast<std::int8_t>(*residual++);
      }
    }
  }

  // Brings back rows [row, row + rows) of one head of a segment.
  void restore(const Segment& segment,
               std::size_t at,
               std::size_t row,
               std::size_t rows,
               const std::uint8_t* symbols,
               std::size_t stride,
               SegmentState& state,
               std::uint8_t* to,
               std::ptrdiff_t to_stride) const {
    const std::size_t head = segment.first_head + at;
    const std::size_t channel = head * shape().dim;
    RestoreRows<std::int8_t> job{};
    job.quantised = reinterpret_cast<const std::int8_t*>(symbols);
    job.quantised_stride = stride;
    job.rows = rows;
    job.dim = shape().dim;
    job.target = to;
    job.target_stride = to_stride;
    job.transform.mean = transform_.has_mean ? parameters_->mean.data() + channel : nullptr;
    job.transform.rho = transform_.has_dpcm ? parameters_->rho.data() + channel : nullptr;
    job.transform.state = transform_.has_dpcm ? state.rebuilt.data() + at * shape().dim : nullptr;
    const std::size_t coded = segment.first_token + row;
    if (transform_.axis != StepAxis::kToken) {
      job.transform.steps = tables_->steps.data() + channel;
    } else if (!transform_.has_dpcm && offsets_.is_uniform(head)) {
      job.row_steps = state.steps.data() + at * segment.num_tokens + row;
    } else {
      job.transform.steps = state.row_steps.data();
      job.rows = 1;
      for (std::size_t each = 0; each < rows; ++each) {
        const int scale = state.scales[at * segment.num_tokens + row + each];
        for (std::size_t i = 0; i < shape().dim; ++i) {
          state.row_steps[i] = step_of(offsets_.code(scale, head, i));
        }
        restore_rows(job, head, coded + each, state);
        job.quantised += stride;
        job.target += to_stride;
      }
      return;
    }
    restore_rows(job, head, coded, state);
  }

  // `coded`: the first of the rows, counted in the plane.
  void restore_rows(const RestoreRows<std::int8_t>& job,
                    std::size_t head,
                    std::size_t coded,
                    SegmentState& state) const {
    if (entry_.low_bits == 0) {
      loops_.restore8(job);
      return;
    }
    const std::size_t padded = grid().padded_dim();
    state.widened.resize(std::max(state.widened.size(), job.rows * padded));
    for (std::size_t row = 0; row < job.rows; ++row) {
      const std::size_t at = (head * grid().tokens + coded + row) * entry_.low_bits;
      append_low_bits(job.quantised + row * job.quantised_stride,
                      sections_.lows + at * low_row_nbytes(job.dim), job.dim, entry_.low_bits,
                      state.widened.data() + row * padded);
    }
    loops_.restore16(RestoreRows<std::int16_t>{state.widened.data(), padded, job.rows, job.dim,
                                               job.transform, job.row_steps, job.target,
                                               job.target_stride});
  }

  PlaneEntry entry_;
  Transform transform_;
  const PlaneParameters* parameters_;
  const ElementLoops& loops_;
  RowSteps offsets_;
  QuantisedSections sections_;
  std::shared_ptr<const ChannelTables> tables_;
};

}  // namespace

std::unique_ptr<PlaneReader> open_quantised_plane(std::size_t plane,
                                                  const PlaneShape& shape,
                                                  const PlaneEntry& entry,
                                                  const PlaneParameters* calibrated,
                                                  ConstBytes stored) {
  return std::make_unique<QuantisedReader>(plane, shape, entry, calibrated, stored);
}

}  // namespace kv
