// SPDX-License-Identifier: Apache-2.0
// The header of an extent, and the record behind it, checked and decoded in one go.
#include "codec/extent_decode.hpp"

#include <algorithm>
#include <utility>

#include "codec/container.hpp"
#include "codec/record.hpp"

namespace kv {
namespace {

bool is_lossy(Profile profile) {
  return profile != Profile::kRaw && profile != Profile::kZstd && profile != Profile::kLossless;
}

bool is_readable(const SlotCoding& coding, const RecordInfo& info) {
  const Geometry& geometry = coding.geometry;
  return info.num_layers == geometry.num_layers() && info.kv_heads == geometry.kv_heads() &&
         info.key_dim == geometry.key_dim() && info.value_dim == geometry.value_dim() &&
         info.dtype == coding.dtype && (coding.has_lossy || !is_lossy(info.profile)) &&
         std::none_of(info.planes.begin(), info.planes.end(),
                      [](const PlaneEntry& entry) { return entry.coding == Coding::kSplit; });
}

}  // namespace

bool decode_extent(const SlotCoding& coding,
                   const ExpectedBlock& expected,
                   ConstBytes extent,
                   std::uint8_t* slot) {
  if (!is_extent_of(extent, expected.key, expected.generation, expected.record_nbytes)) {
    return false;
  }
  const ConstBytes record = extent.sub(kExtentHeaderNbytes, expected.record_nbytes);
  RecordInfo info = parse_header(record);
  if (info.num_tokens != expected.num_tokens || !is_readable(coding, info)) {
    return false;
  }
  const Calibration* calibration = nullptr;
  if (info.calibration != CalibrationId{}) {
    const auto known =
        std::find_if(coding.calibrations.begin(), coding.calibrations.end(),
                     [&](const Calibration* each) { return each->id() == info.calibration; });
    if (known == coding.calibrations.end()) {
      return false;
    }
    calibration = *known;
  }
  const BlockView block(coding.geometry, coding.dtype, info.num_tokens);
  const RecordPart part{0, std::move(info.planes), info.segment_tokens, record, 0, 0};
  if (!open_planes(block, part).empty()) {
    return false;
  }
  std::vector<TargetRows> targets;
  targets.reserve(part.planes.size());
  for (std::size_t plane = 0; plane < part.planes.size(); ++plane) {
    targets.push_back(block.rows(slot, plane));
  }
  decode_planes(block, part, {}, calibration,
                Window{0, block.geometry.kv_heads(), 0, block.num_tokens}, targets);
  return true;
}

}  // namespace kv
