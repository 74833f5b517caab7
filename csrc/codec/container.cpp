// SPDX-License-Identifier: Apache-2.0
// Field offsets of FORMAT.md, and the checks in the order of its section 10.
#include "codec/container.hpp"

#include <cstring>
#include <string>

#include "codec/groups.hpp"
#include "core/crc32c.hpp"
#include "core/endian.hpp"
#include "core/geometry.hpp"

namespace kv {
namespace {

constexpr char kMagic[] = {'K', 'V', 'X', '1'};
constexpr std::size_t kCrcOffset = 8;

// Offsets of FORMAT.md section 1.
constexpr std::size_t kMajorAt = 4;
constexpr std::size_t kMinorAt = 5;
constexpr std::size_t kSegmentTokensAt = 6;
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
constexpr std::size_t kCalibrationAt = 48;

// Offsets of FORMAT.md section 2.
constexpr std::size_t kEntryCrcAt = 4;
constexpr std::size_t kEntryCodingAt = 8;
constexpr std::size_t kEntryTransformAt = 9;
constexpr std::size_t kEntryMultAt = 10;
constexpr std::size_t kEntryLowBitsAt = 11;
constexpr std::size_t kEntryRawRowsAt = 12;
constexpr std::size_t kEntryScaleClassAt = 13;
constexpr std::size_t kEntryHeadsAt = 14;

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
                std::to_string(kMajorVersion) + ": read it with the kvstore of that version");
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
  KV_EXPECT(crc_without(header, kCrcOffset) == load_le<std::uint32_t>(data + kCrcOffset),
            CorruptRecord, "header or directory is damaged: its checksum does not match");
  return header;
}

void parse_fields(const std::uint8_t* data, RecordInfo& info) {
  const std::uint32_t unknown = load_le<std::uint32_t>(data + kFlagsAt) & kRequiredFlags;
  KV_EXPECT(unknown == 0, UnsupportedFormat,
            "record needs features with flags " + std::to_string(unknown) +
                ": read it with a newer kvstore");
  KV_EXPECT(data[kDTypeAt] <= static_cast<std::uint8_t>(DType::kFloat32), UnsupportedFormat,
            "record has unknown dtype " + std::to_string(data[kDTypeAt]));
  KV_EXPECT(data[kProfileAt] <= static_cast<std::uint8_t>(Profile::kPca), UnsupportedFormat,
            "record has unknown profile " + std::to_string(data[kProfileAt]));
  info.major = data[kMajorAt];
  info.minor = data[kMinorAt];
  info.segment_tokens = load_le<std::uint16_t>(data + kSegmentTokensAt);
  info.dtype = static_cast<DType>(data[kDTypeAt]);
  info.profile = static_cast<Profile>(data[kProfileAt]);
  info.num_layers = load_le<std::uint16_t>(data + kLayersAt);
  info.kv_heads = load_le<std::uint16_t>(data + kHeadsAt);
  info.key_dim = load_le<std::uint16_t>(data + kKeyDimAt);
  info.value_dim = load_le<std::uint16_t>(data + kValueDimAt);
  info.num_tokens = load_le<std::uint16_t>(data + kTokensAt);
  info.first_token = load_le<std::uint64_t>(data + kFirstTokenAt);
  info.total_nbytes = load_le<std::uint64_t>(data + kTotalAt);
  std::memcpy(info.calibration.data(), data + kCalibrationAt, info.calibration.size());
  KV_EXPECT(info.kv_heads > 0 && info.key_dim > 0 && info.value_dim > 0 && info.num_tokens > 0 &&
                info.segment_tokens > 0,
            CorruptRecord, "header states a size of 0");
}

PlaneEntry parse_entry(const std::uint8_t* data, std::size_t plane) {
  const unsigned coding = data[kEntryCodingAt];
  KV_EXPECT(coding <= static_cast<unsigned>(Coding::kBasis), UnsupportedFormat,
            plane_name(plane) + " has unknown coding " + std::to_string(coding) +
                ": read it with a newer kvstore");
  PlaneEntry entry;
  entry.nbytes = load_le<std::uint32_t>(data);
  entry.crc32c = load_le<std::uint32_t>(data + kEntryCrcAt);
  entry.coding = static_cast<Coding>(coding);
  entry.transform = data[kEntryTransformAt];
  entry.mult = load_le<std::int8_t>(data + kEntryMultAt);
  entry.low_bits = data[kEntryLowBitsAt];
  entry.raw_rows = data[kEntryRawRowsAt];
  entry.scale_class = data[kEntryScaleClassAt];
  entry.segment_heads = load_le<std::uint16_t>(data + kEntryHeadsAt);
  return entry;
}

void write_entry_at(const PlaneEntry& entry, std::uint8_t* at) {
  store_le<std::uint32_t>(at, static_cast<std::uint32_t>(entry.nbytes));
  store_le<std::uint32_t>(at + kEntryCrcAt, entry.crc32c);
  at[kEntryCodingAt] = static_cast<std::uint8_t>(entry.coding);
  at[kEntryTransformAt] = entry.transform;
  store_le<std::int8_t>(at + kEntryMultAt, entry.mult);
  at[kEntryLowBitsAt] = entry.low_bits;
  at[kEntryRawRowsAt] = entry.raw_rows;
  at[kEntryScaleClassAt] = entry.scale_class;
  store_le<std::uint16_t>(at + kEntryHeadsAt, entry.segment_heads);
}

// The rules for the fields that only coding 3 may use.
bool is_quantised_entry(const PlaneEntry& entry, const PlaneShape& shape) {
  const Transform transform = Transform::from(entry.transform);
  const bool has_scales = transform.axis == StepAxis::kToken;
  const bool is_scale_class = entry.scale_class < kNumClasses || entry.scale_class == kStoredScales;
  return transform.is_consistent() && entry.low_bits <= kMaxLowBits &&
         entry.raw_rows <= kMaxRawRows && entry.raw_rows < shape.tokens &&
         (has_scales ? is_scale_class : entry.scale_class == 0);
}

bool has_no_fields(const PlaneEntry& entry) {
  return entry.transform == 0 && entry.low_bits == 0 && entry.raw_rows == 0 &&
         entry.scale_class == 0;
}

// A group's first plane holds its symbols; how many runs of 64 they are, the calibration says. The
// others hold nothing.
bool is_basis_entry(const PlaneEntry& entry, const PlaneShape& shape) {
  if (!has_no_fields(entry)) {
    return false;
  }
  if (entry.nbytes == 0) {
    return entry.mult == 0 && entry.segment_heads == 0;
  }
  const SegmentGrid most{kMaxSegmentSymbols, kGroup, shape.tokens, entry.segment_heads,
                         shape.segment_tokens};
  return most.is_valid();
}

}  // namespace

bool is_calibrated(const PlaneEntry& entry) noexcept {
  return entry.coding == Coding::kBasis ||
         Transform::from(entry.transform).source == ParameterSource::kCalibration;
}

std::uint32_t crc_without(ConstBytes bytes, std::size_t crc_at) {
  constexpr std::uint8_t kZeros[4] = {};
  std::uint32_t crc = crc32c(bytes.sub(0, crc_at));
  crc = crc32c(ConstBytes(kZeros, sizeof(kZeros)), crc);
  const std::size_t after = crc_at + sizeof(kZeros);
  return crc32c(bytes.sub(after, bytes.size() - after), crc);
}

bool is_allowed(Profile profile, Coding coding) noexcept {
  switch (coding) {
    case Coding::kRaw:
      return true;
    case Coding::kSplit:
      return profile == Profile::kZstd;
    case Coding::kExponent:
      return profile >= Profile::kLossless;
    case Coding::kQuantised:
      return profile >= Profile::kQ8;
    case Coding::kBasis:
      return profile == Profile::kPca;
  }
  return false;
}

Profile profile_from(unsigned number) {
  KV_EXPECT(number <= static_cast<unsigned>(Profile::kPca), ShapeError,
            "unknown profile number " + std::to_string(number));
  return static_cast<Profile>(number);
}

void check_entry(const PlaneEntry& entry, std::size_t plane, const PlaneShape& shape) {
  const std::uint64_t raw_nbytes = shape.raw_nbytes();
  KV_EXPECT(entry.raw_nbytes == raw_nbytes && raw_nbytes <= kMaxPlaneNbytes, CorruptRecord,
            plane_name(plane) + " has " + std::to_string(raw_nbytes) +
                " raw bytes by its sizes, which is not possible");
  bool is_valid = true;
  if (entry.coding == Coding::kBasis) {
    is_valid = is_basis_entry(entry, shape);
  } else {
    KV_EXPECT(entry.coding == Coding::kRaw ? entry.nbytes == raw_nbytes : entry.nbytes < raw_nbytes,
              CorruptRecord,
              plane_name(plane) + " states " + std::to_string(entry.nbytes) +
                  " bytes, which its coding does not allow");
    if (entry.coding == Coding::kQuantised) {
      KV_EXPECT(Transform::is_known(entry.transform), UnsupportedFormat,
                plane_name(plane) + " has unknown transform " + std::to_string(entry.transform) +
                    ": read it with a newer kvstore");
      is_valid = is_quantised_entry(entry, shape);
    } else {
      is_valid = has_no_fields(entry) && entry.mult == 0;
    }
    if (entry.coding >= Coding::kExponent) {
      is_valid = is_valid && shape.grid(entry.raw_rows, entry.segment_heads).is_valid();
    } else {
      is_valid = is_valid && entry.segment_heads == 0;
    }
  }
  KV_EXPECT(is_valid, CorruptRecord,
            plane_name(plane) + " has a directory entry that its coding does not allow");
}

RecordInfo parse_header(ConstBytes record) {
  const ConstBytes header = checked_header(record);
  RecordInfo info;
  parse_fields(header.data(), info);
  info.planes.resize(2 * info.num_layers);
  std::uint64_t offset = header.size();
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    PlaneEntry& entry = info.planes[plane];
    entry = parse_entry(header.data() + kHeaderNbytes + plane * kEntryNbytes, plane);
    entry.offset = offset;
    entry.raw_nbytes = info.shape(plane).raw_nbytes();
    check_entry(entry, plane, info.shape(plane));
    KV_EXPECT(is_allowed(info.profile, entry.coding), CorruptRecord,
              plane_name(plane) + " has a coding that the record's profile does not allow");
    KV_EXPECT(!is_calibrated(entry) || info.calibration != CalibrationId{}, CorruptRecord,
              plane_name(plane) + " needs a calibration, and the header names none");
    offset += entry.padded_nbytes();
  }
  check_groups(info.planes);
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
  store_le<std::uint16_t>(data + kSegmentTokensAt, static_cast<std::uint16_t>(info.segment_tokens));
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
  std::memcpy(data + kCalibrationAt, info.calibration.data(), info.calibration.size());
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    write_entry_at(info.planes[plane], data + kHeaderNbytes + plane * kEntryNbytes);
  }
  store_le<std::uint32_t>(data + kCrcOffset,
                          crc_without(ConstBytes(header.data(), header.size()), kCrcOffset));
}

}  // namespace kv
