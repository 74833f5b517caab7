// SPDX-License-Identifier: Apache-2.0
// Header and directory of a record, as FORMAT.md sections 1, 2 and 10 define them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/calibration.hpp"
#include "core/span.hpp"
#include "planes/plane.hpp"

namespace kv {

constexpr std::size_t kHeaderNbytes = 64;
constexpr std::size_t kEntryNbytes = 16;
constexpr std::uint8_t kMajorVersion = 1;
constexpr std::uint8_t kMinorVersion = 0;
/// Flags that a reader must know.
constexpr std::uint32_t kRequiredFlags = 0xFFFFU;

enum class Profile : std::uint8_t {
  kRaw = 0,
  kZstd = 1,
  kLossless = 2,
  kQ8 = 3,
  kQ4 = 4,
  kQ3 = 5,
  kQ2 = 6,
  kPca = 7
};
[[nodiscard]] bool is_allowed(Profile profile, Coding coding) noexcept;

/// @throws ShapeError when the number is not one of FORMAT.md's; for numbers that come from
/// callers, not from disk.
[[nodiscard]] Profile profile_from(unsigned number);

/// Header and directory.
struct RecordInfo {
  std::uint8_t major = kMajorVersion;
  std::uint8_t minor = kMinorVersion;
  DType dtype = DType::kBFloat16;
  Profile profile = Profile::kRaw;
  std::size_t num_layers = 0;
  std::size_t kv_heads = 0;
  std::size_t key_dim = 0;
  std::size_t value_dim = 0;
  std::size_t num_tokens = 0;
  std::size_t segment_tokens = 0;
  std::uint64_t first_token = 0;
  std::uint64_t total_nbytes = 0;
  CalibrationId calibration{};
  std::vector<PlaneEntry> planes;

  [[nodiscard]] std::size_t header_nbytes() const noexcept {
    return kHeaderNbytes + kEntryNbytes * planes.size();
  }
  [[nodiscard]] PlaneShape shape(std::size_t plane) const noexcept {
    return PlaneShape{kv_heads, num_tokens, plane % 2 == 0 ? key_dim : value_dim, dtype,
                      segment_tokens};
  }
};

/// Reads and checks header and directory; `record` may end right after them.
///
/// `record` is untrusted. Allocates only after the checksum has been verified, in proportion to
/// bytes that are there.
/// @throws UnsupportedFormat, CorruptRecord.
[[nodiscard]] RecordInfo parse_header(ConstBytes record);

/// Writes header and directory; `record` has room for info.header_nbytes().
void write_header(const RecordInfo& info, Bytes record);

/// Checks one entry's fields, not its offset, against the geometry. @throws CorruptRecord or
/// UnsupportedFormat that names the plane.
void check_entry(const PlaneEntry& entry, std::size_t plane, const PlaneShape& shape);

/// True when a plane cannot be read without its calibration.
[[nodiscard]] bool is_calibrated(const PlaneEntry& entry) noexcept;

/// CRC32C of `bytes` with the four at `crc_at` taken as 0.
[[nodiscard]] std::uint32_t crc_without(ConstBytes bytes, std::size_t crc_at);

}  // namespace kv
