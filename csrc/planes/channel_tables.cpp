// SPDX-License-Identifier: Apache-2.0
// Classes and steps of channels as the loops take them.
#include "planes/channel_tables.hpp"

#include <algorithm>
#include <utility>

#include "entropy/classes.hpp"

namespace kv {
namespace {

ChannelTables make_tables(const PlaneShape& shape,
                          const PlaneEntry& entry,
                          const PlaneParameters* parameters) {
  const Transform transform = Transform::from(entry.transform);
  const auto bases = [&](bool is_first) {
    const std::vector<std::uint8_t> classes = channel_classes(
        parameters, transform, entry.mult, entry.low_bits, shape.heads * shape.dim, is_first);
    return lane_bases(classes.data(), shape.heads, shape.dim, kNullClass, kReadPage);
  };
  ChannelTables made{bases(true), {}, {}, entry.transform, entry.mult, entry.low_bits};
  if (transform.has_dpcm) {
    made.rest_bases = bases(false);
  }
  if (transform.axis != StepAxis::kToken) {
    const std::vector<int> codes =
        channel_codes(*parameters, transform.axis, entry.mult, shape.dim);
    made.steps.resize(codes.size());
    std::transform(codes.begin(), codes.end(), made.steps.begin(),
                   [](int code) { return step_of(code); });
  }
  return made;
}

}  // namespace

std::shared_ptr<const ChannelTables> channel_tables(const PlaneShape& shape,
                                                    const PlaneEntry& entry,
                                                    const PlaneParameters* parameters) {
  const bool is_shared = Transform::from(entry.transform).source == ParameterSource::kCalibration;
  if (is_shared) {
    std::shared_ptr<const ChannelTables> latest = std::atomic_load(&parameters->latest_tables);
    if (latest != nullptr && latest->transform == entry.transform && latest->mult == entry.mult &&
        latest->low_bits == entry.low_bits) {
      return latest;
    }
  }
  const std::shared_ptr<const ChannelTables> made =
      std::make_shared<const ChannelTables>(make_tables(shape, entry, parameters));
  if (is_shared) {
    std::atomic_store(&parameters->latest_tables, made);
  }
  return made;
}

}  // namespace kv
