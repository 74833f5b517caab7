// SPDX-License-Identifier: Apache-2.0
// Parameters to steps and classes, with the host coder's own arithmetic.
#include "warp/channels.hpp"

#include "elements/elements.hpp"

namespace kv::warp {

std::vector<ChannelJob> channel_jobs(const PlaneShape& shape,
                                     const PlaneEntry& entry,
                                     const PlaneParameters* parameters) {
  const Transform transform = Transform::from(entry.transform);
  const std::size_t channels = shape.heads * shape.dim;
  std::vector<ChannelJob> jobs;
  jobs.reserve(channels);
  const std::vector<std::uint8_t> first =
      channel_classes(parameters, transform, entry.mult, entry.low_bits, channels, true);
  const std::vector<std::uint8_t> rest =
      channel_classes(parameters, transform, entry.mult, entry.low_bits, channels, false);
  std::vector<int> codes(channels);
  if (transform.axis != StepAxis::kToken) {
    codes = channel_codes(*parameters, transform.axis, entry.mult, shape.dim);
  } else if (parameters != nullptr) {
    for (std::size_t channel = 0; channel < channels; ++channel) {
      codes[channel] = parameters->step_offset(channel);
    }
  }
  for (std::size_t channel = 0; channel < channels; ++channel) {
    ChannelJob job{};
    job.mean = transform.has_mean ? BFloat16::store(parameters->mean[channel]) : 0;
    job.code = static_cast<std::int16_t>(codes[channel]);
    job.rho = static_cast<std::uint8_t>(transform.has_dpcm ? parameters->rho[channel] * 256.0F : 0);
    job.first_class = first[channel];
    job.rest_class = rest[channel];
    jobs.push_back(job);
  }
  return jobs;
}

}  // namespace kv::warp
