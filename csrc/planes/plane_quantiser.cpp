// SPDX-License-Identifier: Apache-2.0
// Works through a segment head by head, with all rows of a head in one call where they share
// classes.
#include "planes/plane_quantiser.hpp"

#include <algorithm>
#include <cstring>

#include "core/endian.hpp"
#include "elements/low_bits.hpp"

namespace kv {

PlaneQuantiser::PlaneQuantiser(const PlaneShape& shape,
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
      lows_(std::size_t{entry.low_bits} * shape.heads * grid_.tokens * low_row_nbytes(shape.dim)),
      first_(classes_of(true)),
      rest_(choice.transform.has_dpcm ? classes_of(false) : first_),
      state_(shape.dim) {
  if (choice.transform.axis == StepAxis::kToken) {
    return;
  }
  for (const int code : channel_codes(*parameters, choice.transform.axis, choice.mult, shape.dim)) {
    steps_.push_back(step_of(code));
    inverse_steps_.push_back(step_of(-code));
  }
}

QuantisedSegment PlaneQuantiser::quantise(const Segment& segment, const SourceRows& source) {
  QuantisedSegment made;
  const std::size_t padded = grid_.padded_dim();
  made.symbols.assign(segment.num_tokens * segment.num_heads * padded, 0);
  flagged_.clear();
  low_rows_.resize(std::max(low_rows_.size(), segment.num_tokens * shape_.dim));
  flags_.resize(std::max(flags_.size(), segment.num_tokens * shape_.dim));
  for (std::size_t at = 0; at < segment.num_heads; ++at) {
    const std::size_t head = segment.first_head + at;
    std::fill(state_.begin(), state_.end(), 0.0F);
    const bool is_row_by_row = has_steps_of_rows(head);
    for (std::size_t token = 0; token < segment.num_tokens;) {
      // The first row may have other classes than the rest.
      const std::size_t rows = is_row_by_row || token == 0 ? 1 : segment.num_tokens - token;
      const std::size_t row = segment.first_token + token;
      const std::size_t entry = token * segment.num_heads + at;
      const ChannelClasses& classes = token == 0 ? first_ : rest_;
      QuantiseRows job{};
      job.source = source.row(head, choice_.raw_rows + row);
      job.source_stride = source.token_stride;
      job.rows = rows;
      job.dim = shape_.dim;
      set_transform(head, row, job);
      job.largest = classes.radii.data() + head * shape_.dim;
      job.low_bits = entry_.low_bits;
      job.symbols = reinterpret_cast<std::int8_t*>(made.symbols.data() + entry * padded);
      job.symbols_stride = segment.num_heads * padded;
      job.lows = low_rows_.data();
      job.flags = flags_.data();
      if (loops_.quantise(job)) {
        note_exceptions(job, entry, segment.num_heads);
      }
      for (std::size_t each = 0; each < rows && entry_.low_bits > 0; ++each) {
        const std::size_t coded = head * grid_.tokens + row + each;
        pack_low_bits(low_rows_.data() + each * shape_.dim, shape_.dim, entry_.low_bits,
                      lows_.data() + coded * entry_.low_bits * low_row_nbytes(shape_.dim));
      }
      token += rows;
    }
  }
  list_exceptions(made);
  return made;
}

PlaneQuantiser::ChannelClasses PlaneQuantiser::classes_of(bool is_first) const {
  const std::vector<std::uint8_t> classes =
      channel_classes(parameters_, choice_.transform, choice_.mult, entry_.low_bits,
                      shape_.heads * shape_.dim, is_first);
  ChannelClasses found;
  for (const std::uint8_t each : classes) {
    found.radii.push_back(class_tables().radius[each]);
  }
  found.bases = lane_bases(classes.data(), shape_.heads, shape_.dim, kNullClass, kClassWritePage);
  return found;
}

bool PlaneQuantiser::has_steps_of_rows(std::size_t head) const noexcept {
  return choice_.transform.axis == StepAxis::kToken &&
         (choice_.transform.has_dpcm || !offsets_.is_uniform(head));
}

void PlaneQuantiser::set_transform(std::size_t head, std::size_t row, QuantiseRows& job) {
  const std::size_t at = head * shape_.dim;
  RowTransform& transform = job.transform;
  if (choice_.transform.axis != StepAxis::kToken) {
    transform.steps = steps_.data() + at;
    transform.inverse_steps = inverse_steps_.data() + at;
  } else {
    const std::size_t count = has_steps_of_rows(head) ? shape_.dim : job.rows;
    row_steps_.resize(std::max(row_steps_.size(), 2 * count));
    float* steps = row_steps_.data();
    float* inverse_steps = steps + count;
    if (has_steps_of_rows(head)) {
      const int scale = scales_.code(head, row, grid_.tokens);
      for (std::size_t i = 0; i < count; ++i) {
        steps[i] = step_of(offsets_.code(scale, head, i));
        inverse_steps[i] = step_of(-offsets_.code(scale, head, i));
      }
      transform.steps = steps;
      transform.inverse_steps = inverse_steps;
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        const int code = offsets_.code(scales_.code(head, row + i, grid_.tokens), head, 0);
        steps[i] = step_of(code);
        inverse_steps[i] = step_of(-code);
      }
      job.row_steps = steps;
      job.row_inverse_steps = inverse_steps;
    }
  }
  transform.mean = choice_.transform.has_mean ? parameters_->mean.data() + at : nullptr;
  transform.rho = choice_.transform.has_dpcm ? parameters_->rho.data() + at : nullptr;
  transform.state = choice_.transform.has_dpcm ? state_.data() : nullptr;
}

void PlaneQuantiser::note_exceptions(const QuantiseRows& job,
                                     std::size_t entry,
                                     std::size_t heads) {
  const std::uint8_t* flags = flags_.data();
  const std::uint8_t* end = flags + job.rows * shape_.dim;
  for (const auto* at = std::find(flags, end, 1); at != end; at = std::find(at + 1, end, 1)) {
    const std::size_t row = static_cast<std::size_t>(at - flags) / shape_.dim;
    const std::size_t channel = static_cast<std::size_t>(at - flags) % shape_.dim;
    const std::uint8_t* element = job.source +
                                  static_cast<std::ptrdiff_t>(row) * job.source_stride +
                                  channel * shape_.itemsize();
    const std::uint32_t bits =
        shape_.itemsize() == 2 ? load_le<std::uint16_t>(element) : load_le<std::uint32_t>(element);
    const std::size_t index = (entry + row * heads) * shape_.dim + channel;
    flagged_.push_back(Flagged{static_cast<std::uint32_t>(index), bits});
  }
}

void PlaneQuantiser::list_exceptions(QuantisedSegment& segment) {
  std::sort(flagged_.begin(), flagged_.end(),
            [](const Flagged& a, const Flagged& b) { return a.index < b.index; });
  segment.indices.resize(2 * flagged_.size());
  segment.bits.resize(shape_.itemsize() * flagged_.size());
  for (std::size_t at = 0; at < flagged_.size(); ++at) {
    store_le<std::uint16_t>(segment.indices.data() + 2 * at,
                            static_cast<std::uint16_t>(flagged_[at].index));
    std::memcpy(segment.bits.data() + shape_.itemsize() * at, &flagged_[at].bits,
                shape_.itemsize());
  }
}

}  // namespace kv
