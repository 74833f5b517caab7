// SPDX-License-Identifier: Apache-2.0
// Walks through a directory from one layer to the next.
#include "codec/groups.hpp"

#include <string>

namespace kv {
namespace {

bool is_follower(const PlaneEntry& entry) noexcept {
  return entry.coding == Coding::kBasis && entry.nbytes == 0;
}

}  // namespace

std::size_t first_holder(const std::vector<PlaneEntry>& planes, std::size_t layer) noexcept {
  while (layer > 0 && (is_follower(planes[2 * layer]) || is_follower(planes[2 * layer + 1]))) {
    --layer;
  }
  return layer;
}

std::vector<std::size_t> holders_of(const std::vector<PlaneEntry>& planes,
                                    std::size_t first_plane) {
  std::vector<std::size_t> holders(planes.size());
  for (std::size_t index = 0; index < planes.size(); ++index) {
    holders[index] = index;
    if (is_follower(planes[index])) {
      KV_EXPECT(
          index >= 2 && planes[index - 2].coding == Coding::kBasis, CorruptRecord,
          plane_name(first_plane + index) + " has no bytes, and no plane of its group before");
      holders[index] = holders[index - 2];
    }
  }
  return holders;
}

void check_groups(const std::vector<PlaneEntry>& planes) {
  const std::vector<std::size_t> holders = holders_of(planes, 0);
  std::vector<std::uint64_t> raw_nbytes(planes.size(), 0);
  for (std::size_t index = 0; index < planes.size(); ++index) {
    raw_nbytes[holders[index]] += planes[index].raw_nbytes;
  }
  for (std::size_t index = 0; index < planes.size(); ++index) {
    KV_EXPECT(planes[index].coding != Coding::kBasis || is_follower(planes[index]) ||
                  planes[index].nbytes < raw_nbytes[index],
              CorruptRecord,
              plane_name(index) + " states " + std::to_string(planes[index].nbytes) +
                  " bytes for a group of " + std::to_string(raw_nbytes[index]));
  }
}

GroupShape group_shape(const Calibration& calibration, std::size_t plane, const PlaneShape& shape) {
  const Bases& bases = calibration.bases();
  KV_EXPECT(bases.group_layers > 0 && plane / 2 % bases.group_layers == 0 &&
                bases.of_plane(plane).rank > 0,
            CorruptRecord,
            plane_name(plane) + " begins a group for which its calibration has no basis");
  const Basis& basis = bases.of_plane(plane);
  GroupShape group{&basis, {}, plane, shape.tokens, shape.dtype, shape.segment_tokens};
  for (std::size_t layer = 0; layer < basis.layers; ++layer) {
    group.parameters.push_back(&calibration.plane(plane + 2 * layer));
  }
  return group;
}

}  // namespace kv
