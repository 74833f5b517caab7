// SPDX-License-Identifier: Apache-2.0
// Checks a calibration object in the order of its fields, and unpacks it.
#include "codec/calibration.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "codec/container.hpp"
#include "core/crc32c.hpp"
#include "core/endian.hpp"

namespace kv {
namespace {

constexpr char kMagic[] = {'K', 'V', 'C', 'L'};
constexpr std::size_t kHeaderBytes = 32;
constexpr std::uint8_t kMajor = 1;
constexpr std::size_t kCrcAt = 8;
constexpr std::size_t kFlagsAt = 12;
constexpr std::size_t kAlignment = 4;
/// Bases follow the planes.
constexpr std::uint32_t kHasBases = 1;

void check_header(ConstBytes bytes) {
  KV_EXPECT(
      bytes.size() >= kHeaderBytes, CorruptRecord,
      "calibration is cut off: " + std::to_string(bytes.size()) + " bytes, its header has 32");
  const std::uint8_t* data = bytes.data();
  KV_EXPECT(std::memcmp(data, kMagic, sizeof(kMagic)) == 0, CorruptRecord,
            "not a calibration: it does not begin with KVCL");
  KV_EXPECT(data[4] == kMajor, UnsupportedFormat,
            "calibration has format version " + std::to_string(data[4]) +
                "; this kvstore reads version 1: calibrate again or use another kvstore");
  KV_EXPECT(load_le<std::uint64_t>(data + 16) == bytes.size(), CorruptRecord,
            "calibration states " + std::to_string(load_le<std::uint64_t>(data + 16)) +
                " bytes and has " + std::to_string(bytes.size()));
  KV_EXPECT(crc_without(bytes, kCrcAt) == load_le<std::uint32_t>(data + kCrcAt), CorruptRecord,
            "calibration is damaged: its checksum does not match");
  KV_EXPECT((load_le<std::uint32_t>(data + kFlagsAt) & kRequiredFlags & ~kHasBases) == 0,
            UnsupportedFormat, "calibration needs features that this kvstore does not know");
}

}  // namespace

Calibration::Calibration(ConstBytes bytes, const CalibrationId& id) : id_(id) {
  KV_EXPECT(std::any_of(id.begin(), id.end(), [](std::uint8_t byte) { return byte != 0; }),
            ShapeError, "a calibration's id must not be all zeros");
  check_header(bytes);
  KV_EXPECT(load_le<std::uint16_t>(bytes.data() + 6) == 0, CorruptRecord,
            "calibration has a reserved field that is not 0");
  const std::size_t layers = load_le<std::uint16_t>(bytes.data() + 24);
  kv_heads_ = load_le<std::uint16_t>(bytes.data() + 26);
  key_dim_ = load_le<std::uint16_t>(bytes.data() + 28);
  value_dim_ = load_le<std::uint16_t>(bytes.data() + 30);
  KV_EXPECT(layers > 0 && kv_heads_ > 0 && key_dim_ > 0 && value_dim_ > 0, CorruptRecord,
            "calibration states a size of 0");
  const std::uint64_t key_nbytes =
      round_up(calibrated_parameters_nbytes(kv_heads_, key_dim_), kAlignment);
  const std::uint64_t value_nbytes =
      round_up(calibrated_parameters_nbytes(kv_heads_, value_dim_), kAlignment);
  const std::uint64_t planes_nbytes = kHeaderBytes + layers * (key_nbytes + value_nbytes);
  const bool has_bases = (load_le<std::uint32_t>(bytes.data() + kFlagsAt) & kHasBases) != 0;
  KV_EXPECT(
      has_bases ? planes_nbytes < bytes.size() : planes_nbytes == bytes.size(), CorruptRecord,
      "calibration has " + std::to_string(bytes.size()) + " bytes, which its sizes do not give");
  planes_.resize(2 * layers);
  std::uint64_t at = kHeaderBytes;
  for (std::size_t plane = 0; plane < planes_.size(); ++plane) {
    const std::size_t dim = plane % 2 == 0 ? key_dim_ : value_dim_;
    const ConstBytes part = bytes.sub(at, calibrated_parameters_nbytes(kv_heads_, dim));
    KV_EXPECT(read_parameters(part, kv_heads_, dim, ParameterSource::kCalibration, planes_[plane]),
              CorruptRecord, "calibration of " + plane_name(plane) + " has a value out of range");
    at += plane % 2 == 0 ? key_nbytes : value_nbytes;
  }
  if (has_bases) {
    bases_ = read_bases(bytes.sub(at, bytes.size() - at),
                        ModelSizes{layers, kv_heads_, key_dim_, value_dim_});
  }
}

}  // namespace kv
