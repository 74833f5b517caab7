// SPDX-License-Identifier: Apache-2.0
// Header and directory of a record, as FORMAT.md sections 1, 2 and 5 define them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/geometry.hpp"
#include "core/span.hpp"

namespace kv {

constexpr std::size_t kHeaderNbytes = 64;
constexpr std::size_t kEntryNbytes = 32;
constexpr std::size_t kPlaneAlignment = 16;
constexpr std::uint8_t kMajorVersion = 0;
constexpr std::uint8_t kMinorVersion = 0;

enum class DType : std::uint8_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
enum class Profile : std::uint8_t { kRaw = 0, kLossless = 1, kQ8 = 2 };
enum class Coding : std::uint8_t { kRaw = 0, kSplit = 1, kQ8 = 2 };

[[nodiscard]] std::size_t itemsize_of(DType dtype) noexcept;

/// @throws ShapeError when the number is not one of FORMAT.md's; for numbers that come from
/// callers, not from disk.
[[nodiscard]] DType dtype_from(unsigned number);
[[nodiscard]] Profile profile_from(unsigned number);

/// One directory entry.
struct PlaneEntry {
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t raw_nbytes = 0;
  std::uint32_t crc32c = 0;
  Coding coding = Coding::kRaw;

  [[nodiscard]] std::uint64_t padded_nbytes() const noexcept {
    return round_up(nbytes, kPlaneAlignment);
  }
};

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
  std::uint64_t first_token = 0;
  std::uint64_t total_nbytes = 0;
  std::vector<PlaneEntry> planes;

  [[nodiscard]] std::size_t header_nbytes() const noexcept {
    return kHeaderNbytes + kEntryNbytes * planes.size();
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

/// Stored length that `coding` prescribes for a plane, or 0 when it depends on the content.
[[nodiscard]] std::uint64_t fixed_nbytes(Coding coding,
                                         std::uint64_t rows,
                                         std::uint64_t dim,
                                         std::size_t itemsize) noexcept;

/// Checks one entry's lengths, not its offset, against the geometry. @throws CorruptRecord that
/// names the plane.
void check_entry(const PlaneEntry& entry,
                 std::size_t plane,
                 std::uint64_t rows,
                 std::uint64_t dim,
                 std::size_t itemsize);

/// `K of layer 3`.
[[nodiscard]] std::string plane_name(std::size_t plane);

}  // namespace kv
