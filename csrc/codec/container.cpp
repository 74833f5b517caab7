// SPDX-License-Identifier: Apache-2.0
// Field offsets of FORMAT.md, and the checks in the order of its section 5.
#include "codec/container.hpp"

#include <cstring>
#include <string>

#include "core/crc32c.hpp"
#include "core/endian.hpp"

namespace kv {
namespace {

constexpr char kMagic[] = {'K', 'V', 'X', '1'};
constexpr std::uint32_t kRequiredFlags = 0xFFFFU;
constexpr std::size_t kCrcOffset = 8;

// Offsets of FORMAT.md section 1.
constexpr std::size_t kMajorAt = 4;
constexpr std::size_t kMinorAt = 5;
constexpr std::size_t kFlagsAt = 12;
constexpr std::size_t kTotalAt = 16;
constexpr std::size_t kHeaderNbytesAt = 24;
constexpr std::size_t kDTypeAt = 28;
constexpr std::size_t kProfileAt = 29;
constexpr std::size_t kLayersAt = 30;
constexpr std::size_t kHeadsAt = 32;
constexpr std::size_t kKeyDimAt = 34;
constexpr std::size_t kValueDimAt = 36;
constexpr std::size_t kTokensAt = 38;
constexpr std::size_t kFirstTokenAt = 40;

// Offsets of FORMAT.md section 2.
constexpr std::size_t kEntryNbytesAt = 8;
constexpr std::size_t kEntryRawAt = 16;
constexpr std::size_t kEntryCrcAt = 24;
constexpr std::size_t kEntryCodingAt = 28;

std::uint32_t header_crc(ConstBytes header) {
  constexpr std::uint8_t kZeros[4] = {};
  std::uint32_t crc = crc32c(ConstBytes(header.data(), kCrcOffset));
  crc = crc32c(ConstBytes(kZeros, sizeof(kZeros)), crc);
  const std::size_t after = kCrcOffset + sizeof(kZeros);
  return crc32c(header.sub(after, header.size() - after), crc);
}

// Returns header and directory, once it is known that they are complete and intact.
ConstBytes checked_header(ConstBytes record) {
  KV_EXPECT(record.size() >= kHeaderNbytes, CorruptRecord,
            "record is cut off: " + std::to_string(record.size()) + " bytes, the header has 64");
  const std::uint8_t* data = record.data();
  KV_EXPECT(std::memcmp(data, kMagic, sizeof(kMagic)) == 0, CorruptRecord,
            "not a record: it does not begin with KVX1");
  KV_EXPECT(data[kMajorAt] == kMajorVersion, UnsupportedFormat,
            "record has format version " + std::to_string(data[kMajorAt]) + "." +
                std::to_string(data[kMinorAt]) + "; this kvstore reads version " +
                std::to_string(kMajorVersion) + ": read it with a newer kvstore");
  const std::uint64_t num_planes = std::uint64_t{2} * load_le<std::uint16_t>(data + kLayersAt);
  const std::uint64_t wanted = kHeaderNbytes + kEntryNbytes * num_planes;
  const std::uint64_t stated = load_le<std::uint32_t>(data + kHeaderNbytesAt);
  KV_EXPECT(stated == wanted && num_planes > 0, CorruptRecord,
            "header states " + std::to_string(stated) + " bytes for " + std::to_string(num_planes) +
                " planes");
  KV_EXPECT(record.size() >= wanted, CorruptRecord,
            "record is cut off: " + std::to_string(record.size()) +
                " bytes, header and directory have " + std::to_string(wanted));
  const ConstBytes header = record.sub(0, wanted);
  KV_EXPECT(header_crc(header) == load_le<std::uint32_t>(data + kCrcOffset), CorruptRecord,
            "header or directory is damaged: its checksum does not match");
  return header;
}

Coding coding_from(std::uint8_t number, std::size_t plane) {
  KV_EXPECT(number <= static_cast<std::uint8_t>(Coding::kQ8), UnsupportedFormat,
            plane_name(plane) + " has unknown coding " + std::to_string(number) +
                ": read it with a newer kvstore");
  return static_cast<Coding>(number);
}

bool is_allowed(Profile profile, Coding coding) noexcept {
  return static_cast<std::uint8_t>(coding) <= static_cast<std::uint8_t>(profile);
}

void parse_fields(const std::uint8_t* data, RecordInfo& info) {
  const std::uint32_t unknown = load_le<std::uint32_t>(data + kFlagsAt) & kRequiredFlags;
  KV_EXPECT(unknown == 0, UnsupportedFormat,
            "record needs features with flags " + std::to_string(unknown) +
                ": read it with a newer kvstore");
  KV_EXPECT(data[kDTypeAt] <= static_cast<std::uint8_t>(DType::kFloat32), UnsupportedFormat,
            "record has unknown dtype " + std::to_string(data[kDTypeAt]));
  KV_EXPECT(data[kProfileAt] <= static_cast<std::uint8_t>(Profile::kQ8), UnsupportedFormat,
            "record has unknown profile " + std::to_string(data[kProfileAt]));
  info.major = data[kMajorAt];
  info.minor = data[kMinorAt];
  info.dtype = static_cast<DType>(data[kDTypeAt]);
  info.profile = static_cast<Profile>(data[kProfileAt]);
  info.num_layers = load_le<std::uint16_t>(data + kLayersAt);
  info.kv_heads = load_le<std::uint16_t>(data + kHeadsAt);
  info.key_dim = load_le<std::uint16_t>(data + kKeyDimAt);
  info.value_dim = load_le<std::uint16_t>(data + kValueDimAt);
  info.num_tokens = load_le<std::uint16_t>(data + kTokensAt);
  info.first_token = load_le<std::uint64_t>(data + kFirstTokenAt);
  info.total_nbytes = load_le<std::uint64_t>(data + kTotalAt);
  KV_EXPECT(info.kv_heads > 0 && info.key_dim > 0 && info.value_dim > 0 && info.num_tokens > 0,
            CorruptRecord, "header states a size of 0");
}

}  // namespace

std::size_t itemsize_of(DType dtype) noexcept { return dtype == DType::kFloat32 ? 4 : 2; }

DType dtype_from(unsigned number) {
  KV_EXPECT(number <= static_cast<unsigned>(DType::kFloat32), ShapeError,
            "unknown dtype number " + std::to_string(number));
  return static_cast<DType>(number);
}

Profile profile_from(unsigned number) {
  KV_EXPECT(number <= static_cast<unsigned>(Profile::kQ8), ShapeError,
            "unknown profile number " + std::to_string(number));
  return static_cast<Profile>(number);
}

std::string plane_name(std::size_t plane) {
  return (plane % 2 == 0 ? "K of layer " : "V of layer ") + std::to_string(plane / 2);
}

std::uint64_t fixed_nbytes(Coding coding,
                           std::uint64_t rows,
                           std::uint64_t dim,
                           std::size_t itemsize) noexcept {
  switch (coding) {
    case Coding::kRaw:
      return rows * dim * itemsize;
    case Coding::kQ8:
      return rows * (sizeof(float) + dim);
    case Coding::kSplit:
      break;
  }
  return 0;
}

void check_entry(const PlaneEntry& entry,
                 std::size_t plane,
                 std::uint64_t rows,
                 std::uint64_t dim,
                 std::size_t itemsize) {
  const std::uint64_t raw_nbytes = fixed_nbytes(Coding::kRaw, rows, dim, itemsize);
  KV_EXPECT(entry.raw_nbytes == raw_nbytes && raw_nbytes <= kMaxPlaneNbytes, CorruptRecord,
            plane_name(plane) + " states " + std::to_string(entry.raw_nbytes) +
                " raw bytes; its sizes give " + std::to_string(raw_nbytes));
  const std::uint64_t fixed = fixed_nbytes(entry.coding, rows, dim, itemsize);
  const bool is_shrunk = entry.coding == Coding::kRaw || entry.nbytes < raw_nbytes;
  KV_EXPECT((fixed == 0 || entry.nbytes == fixed) && is_shrunk, CorruptRecord,
            plane_name(plane) + " states " + std::to_string(entry.nbytes) +
                " bytes, which its coding does not allow");
}

RecordInfo parse_header(ConstBytes record) {
  const ConstBytes header = checked_header(record);
  RecordInfo info;
  parse_fields(header.data(), info);
  info.planes.resize(2 * info.num_layers);
  std::uint64_t offset = header.size();
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    const std::uint8_t* data = header.data() + kHeaderNbytes + plane * kEntryNbytes;
    PlaneEntry& entry = info.planes[plane];
    entry.offset = load_le<std::uint64_t>(data);
    entry.nbytes = load_le<std::uint64_t>(data + kEntryNbytesAt);
    entry.raw_nbytes = load_le<std::uint64_t>(data + kEntryRawAt);
    entry.crc32c = load_le<std::uint32_t>(data + kEntryCrcAt);
    entry.coding = coding_from(data[kEntryCodingAt], plane);
    check_entry(entry, plane, info.kv_heads * info.num_tokens,
                plane % 2 == 0 ? info.key_dim : info.value_dim, itemsize_of(info.dtype));
    KV_EXPECT(is_allowed(info.profile, entry.coding), CorruptRecord,
              plane_name(plane) + " has a coding that the record's profile does not allow");
    KV_EXPECT(entry.offset == offset, CorruptRecord,
              plane_name(plane) + " states offset " + std::to_string(entry.offset) +
                  "; the planes before it end at " + std::to_string(offset));
    offset += entry.padded_nbytes();
  }
  KV_EXPECT(info.total_nbytes == offset, CorruptRecord,
            "header states " + std::to_string(info.total_nbytes) +
                " bytes in all; the planes end at " + std::to_string(offset));
  return info;
}

void write_header(const RecordInfo& info, Bytes record) {
  const Bytes header = record.sub(0, info.header_nbytes());
  std::uint8_t* data = header.data();
  std::memset(data, 0, header.size());
  std::memcpy(data, kMagic, sizeof(kMagic));
  data[kMajorAt] = info.major;
  data[kMinorAt] = info.minor;
  store_le<std::uint64_t>(data + kTotalAt, info.total_nbytes);
  store_le<std::uint32_t>(data + kHeaderNbytesAt, static_cast<std::uint32_t>(header.size()));
  data[kDTypeAt] = static_cast<std::uint8_t>(info.dtype);
  data[kProfileAt] = static_cast<std::uint8_t>(info.profile);
  store_le<std::uint16_t>(data + kLayersAt, static_cast<std::uint16_t>(info.num_layers));
  store_le<std::uint16_t>(data + kHeadsAt, static_cast<std::uint16_t>(info.kv_heads));
  store_le<std::uint16_t>(data + kKeyDimAt, static_cast<std::uint16_t>(info.key_dim));
  store_le<std::uint16_t>(data + kValueDimAt, static_cast<std::uint16_t>(info.value_dim));
  store_le<std::uint16_t>(data + kTokensAt, static_cast<std::uint16_t>(info.num_tokens));
  store_le<std::uint64_t>(data + kFirstTokenAt, info.first_token);
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    const PlaneEntry& entry = info.planes[plane];
    std::uint8_t* at = data + kHeaderNbytes + plane * kEntryNbytes;
    store_le<std::uint64_t>(at, entry.offset);
    store_le<std::uint64_t>(at + kEntryNbytesAt, entry.nbytes);
    store_le<std::uint64_t>(at + kEntryRawAt, entry.raw_nbytes);
    store_le<std::uint32_t>(at + kEntryCrcAt, entry.crc32c);
    at[kEntryCodingAt] = static_cast<std::uint8_t>(entry.coding);
  }
  store_le<std::uint32_t>(data + kCrcOffset, header_crc(ConstBytes(header.data(), header.size())));
}

}  // namespace kv
