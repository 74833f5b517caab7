// SPDX-License-Identifier: Apache-2.0
// Places of rows as Python describes them.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "core/device.hpp"
#include "warp/places.hpp"

namespace kv::bindings {

/// Address, head stride, row stride, page stride, number of pages.
using TargetTuple =
    std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;
/// Address and length.
using RangeTuple = std::tuple<std::uint64_t, std::uint64_t>;
/// Tokens of a page, first row, slots.
using PagingTuple = std::tuple<std::uint32_t, std::uint32_t, std::vector<std::int32_t>>;

[[nodiscard]] inline std::vector<warp::PlaneTarget> targets_from(
    const std::vector<TargetTuple>& tuples) {
  std::vector<warp::PlaneTarget> targets;
  for (const auto& [address, head, row, page, pages] : tuples) {
    targets.push_back(warp::PlaneTarget{address, head, row, page, pages});
  }
  return targets;
}

[[nodiscard]] inline warp::Paging paging_from(const PagingTuple& tuple) {
  return warp::Paging{std::get<0>(tuple), std::get<1>(tuple), std::get<2>(tuple)};
}

[[nodiscard]] inline device::DeviceBytes range_from(const RangeTuple& tuple) {
  return device::DeviceBytes{std::get<0>(tuple), std::get<1>(tuple)};
}

}  // namespace kv::bindings
