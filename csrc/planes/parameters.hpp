// SPDX-License-Identifier: Apache-2.0
// What describes the channels of one plane: from a calibration object or in-line (FORMAT.md
// sections 6.1 to 6.3 and 8).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/span.hpp"
#include "entropy/segments.hpp"

namespace kv {

enum class StepAxis : std::uint8_t { kHead = 0, kToken = 1, kChannel = 2 };
/// kInlineWeighted: in-line, with steps that follow from the deviations.
enum class ParameterSource : std::uint8_t {
  kNone = 0,
  kCalibration = 1,
  kInline = 2,
  kInlineWeighted = 3
};

/// The transform byte of the directory.
struct Transform {
  StepAxis axis = StepAxis::kToken;
  bool has_mean = false;
  bool has_dpcm = false;
  ParameterSource source = ParameterSource::kNone;

  [[nodiscard]] std::uint8_t byte() const noexcept;
  [[nodiscard]] bool is_inline() const noexcept {
    return source == ParameterSource::kInline || source == ParameterSource::kInlineWeighted;
  }
  /// True when `byte` uses no number that this version does not know.
  [[nodiscard]] static bool is_known(std::uint8_t byte) noexcept;
  /// `byte` is known.
  [[nodiscard]] static Transform from(std::uint8_t byte) noexcept;
  /// True when the fields may stand together.
  [[nodiscard]] bool is_consistent() const noexcept;
};

constexpr int kMaxLogRms = 1000;

struct ChannelTables;

/// Sections 6.2: of one plane; heads and channels in the plane's order.
struct PlaneParameters {
  std::vector<std::int16_t> log_rms;            ///< [heads]
  std::vector<float> mean;                      ///< [heads, dim], values of bfloat16
  std::vector<std::int8_t> log_sigma;           ///< [heads, dim]
  std::vector<std::int8_t> log_residual_sigma;  ///< [heads, dim], empty when in-line
  std::vector<float> rho;                       ///< [heads, dim], empty when in-line
  std::vector<std::int8_t> log_step;            ///< [heads, dim], empty when all are 0

  /// Of the plane that was read last with these; channel_tables keeps it, with atomic operations.
  mutable std::shared_ptr<const ChannelTables> latest_tables;

  /// What a channel adds to its step's code.
  [[nodiscard]] int step_offset(std::size_t channel) const noexcept {
    return log_step.empty() ? 0 : log_step[channel];
  }
};

/// Bytes of the parameters, without padding.
[[nodiscard]] std::size_t inline_parameters_nbytes(std::size_t heads, std::size_t dim) noexcept;
[[nodiscard]] std::size_t calibrated_parameters_nbytes(std::size_t heads, std::size_t dim) noexcept;

/// Reads them; `bytes` has the length above.
/// @return false when a value is out of range.
[[nodiscard]] bool read_parameters(ConstBytes bytes,
                                   std::size_t heads,
                                   std::size_t dim,
                                   ParameterSource source,
                                   PlaneParameters& parameters);

/// The steps of ParameterSource::kInlineWeighted, from log_sigma.
void derive_log_steps(PlaneParameters& parameters);

/// Writes in-line parameters: the inverse of read_parameters.
void write_inline_parameters(const PlaneParameters& parameters, std::uint8_t* bytes);

/// The class of every channel, [heads, dim], in the first token of a segment or in the others.
/// @param parameters  null for ParameterSource::kNone.
[[nodiscard]] std::vector<std::uint8_t> channel_classes(const PlaneParameters* parameters,
                                                        const Transform& transform,
                                                        int mult,
                                                        unsigned low_bits,
                                                        std::size_t channels,
                                                        bool is_first);

/// Steps of the rows of StepAxis::kToken: one a row where a head's channels all add the same to its
/// code, else one a channel.
class RowSteps {
 public:
  /// @param parameters  null for ParameterSource::kNone.
  RowSteps(const PlaneParameters* parameters, std::size_t heads, std::size_t dim);

  [[nodiscard]] bool is_uniform(std::size_t head) const noexcept {
    return parameters_ == nullptr || is_uniform_[head];
  }
  /// The code of a channel of a row whose scale is `scale`.
  [[nodiscard]] int code(int scale, std::size_t head, std::size_t i) const noexcept {
    return parameters_ == nullptr ? scale : scale + parameters_->step_offset(head * dim_ + i);
  }

 private:
  const PlaneParameters* parameters_;
  std::size_t dim_;
  std::vector<bool> is_uniform_;
};

/// The step code of every channel, [heads, dim]; the axis is not kToken.
[[nodiscard]] std::vector<int> channel_codes(const PlaneParameters& parameters,
                                             StepAxis axis,
                                             int mult,
                                             std::size_t dim);

}  // namespace kv
