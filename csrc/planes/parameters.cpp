// SPDX-License-Identifier: Apache-2.0
// The arithmetic of steps and classes, in integers.
#include "planes/parameters.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/endian.hpp"
#include "elements/elements.hpp"
#include "entropy/classes.hpp"

namespace kv {
namespace {

constexpr std::uint8_t kMeanBit = 1U << 2;
constexpr std::uint8_t kDpcmBit = 1U << 3;
constexpr std::uint8_t kMaxRho = 250;
constexpr std::int16_t kLastClass = kNumClasses - 1;

// What a channel's own step takes of its standard deviation, in eighths of an octave.
int channel_share(int log_sigma) noexcept { return (log_sigma + 2) >> 2; }

}  // namespace

std::uint8_t Transform::byte() const noexcept {
  return static_cast<std::uint8_t>(static_cast<unsigned>(axis) | (has_mean ? kMeanBit : 0U) |
                                   (has_dpcm ? kDpcmBit : 0U) | static_cast<unsigned>(source) << 4);
}

bool Transform::is_known(std::uint8_t byte) noexcept { return (byte & 3U) != 3 && byte >> 6 == 0; }

Transform Transform::from(std::uint8_t byte) noexcept {
  return Transform{static_cast<StepAxis>(byte & 3U), (byte & kMeanBit) != 0, (byte & kDpcmBit) != 0,
                   static_cast<ParameterSource>((byte >> 4) & 3U)};
}

bool Transform::is_consistent() const noexcept {
  if (source == ParameterSource::kNone) {
    return axis == StepAxis::kToken && !has_mean && !has_dpcm;
  }
  if (source == ParameterSource::kInlineWeighted && axis != StepAxis::kHead) {
    return false;
  }
  return !has_dpcm || source == ParameterSource::kCalibration;
}

std::size_t inline_parameters_nbytes(std::size_t heads, std::size_t dim) noexcept {
  return heads * (2 + 3 * dim);
}

std::size_t calibrated_parameters_nbytes(std::size_t heads, std::size_t dim) noexcept {
  return heads * (2 + 6 * dim);
}

bool read_parameters(ConstBytes bytes,
                     std::size_t heads,
                     std::size_t dim,
                     ParameterSource source,
                     PlaneParameters& parameters) {
  const std::size_t channels = heads * dim;
  const std::uint8_t* at = bytes.data();
  bool is_valid = true;
  parameters.log_rms.resize(heads);
  for (std::int16_t& log_rms : parameters.log_rms) {
    log_rms = load_le<std::int16_t>(at);
    is_valid &= log_rms >= -kMaxLogRms && log_rms <= kMaxLogRms;
    at += 2;
  }
  parameters.mean.resize(channels);
  for (float& mean : parameters.mean) {
    mean = BFloat16::load(load_le<std::uint16_t>(at));
    is_valid &= std::isfinite(mean);
    at += 2;
  }
  const auto* signed_at = reinterpret_cast<const std::int8_t*>(at);
  parameters.log_sigma.assign(signed_at, signed_at + channels);
  if (source == ParameterSource::kInlineWeighted) {
    derive_log_steps(parameters);
  }
  if (source != ParameterSource::kCalibration) {
    return is_valid;
  }
  parameters.log_residual_sigma.assign(signed_at + channels, signed_at + 2 * channels);
  at += 2 * channels;
  parameters.rho.resize(channels);
  for (float& rho : parameters.rho) {
    is_valid &= *at <= kMaxRho;
    rho = static_cast<float>(*at) * 0x1p-8F;
    ++at;
  }
  const auto* steps_at = reinterpret_cast<const std::int8_t*>(at);
  parameters.log_step.assign(steps_at, steps_at + channels);
  return is_valid;
}

void derive_log_steps(PlaneParameters& parameters) {
  parameters.log_step.resize(parameters.log_sigma.size());
  std::transform(
      parameters.log_sigma.begin(), parameters.log_sigma.end(), parameters.log_step.begin(),
      [](int log_sigma) { return static_cast<std::int8_t>(-((3 * log_sigma + 8) >> 4)); });
}

void write_inline_parameters(const PlaneParameters& parameters, std::uint8_t* bytes) {
  for (const std::int16_t log_rms : parameters.log_rms) {
    store_le<std::int16_t>(bytes, log_rms);
    bytes += 2;
  }
  for (const float mean : parameters.mean) {
    store_le<std::uint16_t>(bytes, BFloat16::store(mean));
    bytes += 2;
  }
  std::memcpy(bytes, parameters.log_sigma.data(), parameters.log_sigma.size());
}

std::vector<std::uint8_t> channel_classes(const PlaneParameters* parameters,
                                          const Transform& transform,
                                          int mult,
                                          unsigned low_bits,
                                          std::size_t channels,
                                          bool is_first) {
  const int scale = 4 * (mult - 8 * static_cast<int>(low_bits)) + 8;
  std::vector<std::uint8_t> classes(channels);
  if (parameters == nullptr) {
    const int wanted = std::min(std::max((scale >> 4) + 6, 0), int{kLastClass});
    std::fill(classes.begin(), classes.end(), static_cast<std::uint8_t>(wanted));
    return classes;
  }
  const bool is_residual = transform.has_dpcm && !is_first;
  const std::int8_t* levels =
      is_residual ? parameters->log_residual_sigma.data() : parameters->log_sigma.data();
  const std::vector<std::int8_t> zeros(parameters->log_step.empty() ? channels : 0);
  const std::int8_t* steps = zeros.empty() ? parameters->log_step.data() : zeros.data();
  // In 16 bits, which all sums fit: the compiler makes vectors of them on any CPU.
  std::vector<std::int16_t> level(channels);
  for (std::size_t channel = 0; channel < channels; ++channel) {
    level[channel] = static_cast<std::int16_t>(levels[channel] - 4 * steps[channel] + scale);
  }
  if (transform.axis == StepAxis::kChannel) {
    for (std::size_t channel = 0; channel < channels; ++channel) {
      level[channel] = static_cast<std::int16_t>(level[channel] -
                                                 4 * channel_share(parameters->log_sigma[channel]));
    }
  }
  for (std::size_t channel = 0; channel < channels; ++channel) {
    const auto wanted = static_cast<std::int16_t>((level[channel] >> 4) + 6);
    const auto lowest = std::max(wanted, std::int16_t{0});
    classes[channel] = static_cast<std::uint8_t>(std::min(lowest, kLastClass));
  }
  return classes;
}

RowSteps::RowSteps(const PlaneParameters* parameters, std::size_t heads, std::size_t dim)
    : parameters_(parameters), dim_(dim), is_uniform_(heads, true) {
  if (parameters != nullptr && !parameters->log_step.empty()) {
    for (std::size_t head = 0; head < heads; ++head) {
      const std::int8_t* steps = parameters->log_step.data() + head * dim;
      // Each equals the one after it.
      is_uniform_[head] = std::memcmp(steps, steps + 1, dim - 1) == 0;
    }
  }
}

std::vector<int> channel_codes(const PlaneParameters& parameters,
                               StepAxis axis,
                               int mult,
                               std::size_t dim) {
  std::vector<int> codes(parameters.log_sigma.size());
  for (std::size_t channel = 0; channel < codes.size(); ++channel) {
    codes[channel] = parameters.log_rms[channel / dim] + parameters.step_offset(channel) - mult;
    if (axis == StepAxis::kChannel) {
      codes[channel] += channel_share(parameters.log_sigma[channel]);
    }
    codes[channel] = std::min(std::max(codes[channel], -kMaxStepCode), kMaxStepCode);
  }
  return codes;
}

}  // namespace kv
