// SPDX-License-Identifier: Apache-2.0
// Writes and checks extent headers, as kvstore/tiers/tables/records.py does.
#include "codec/extent.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/crc32c.hpp"
#include "core/endian.hpp"
#include "core/error.hpp"
#include "core/geometry.hpp"

namespace kv {
namespace {

constexpr std::uint8_t kMagic[] = {'K', 'V', 'X', 'T'};
constexpr std::uint16_t kVersion = 1;
constexpr std::size_t kVersionAt = 4;
constexpr std::size_t kGenerationAt = 8;
constexpr std::size_t kRecordNbytesAt = 16;
constexpr std::size_t kKeyAt = 24;
constexpr std::size_t kRecordCrcAt = 56;
constexpr std::size_t kCrcAt = 60;

}  // namespace

std::size_t seal_extent(const BlockKey& key,
                        std::uint64_t generation,
                        std::uint64_t record_nbytes,
                        Bytes room) {
  KV_EXPECT(
      room.size() >= kExtentHeaderNbytes && record_nbytes <= room.size() - kExtentHeaderNbytes,
      ShapeError,
      "a record of " + std::to_string(record_nbytes) + " bytes and its header in " +
          std::to_string(room.size()));
  const std::uint64_t used = kExtentHeaderNbytes + record_nbytes;
  const Bytes extent = room.sub(0, round_up(used, kPageNbytes));
  std::uint8_t* data = extent.data();
  std::memset(data + used, 0, extent.size() - used);
  std::memset(data, 0, kExtentHeaderNbytes);
  std::memcpy(data, kMagic, sizeof(kMagic));
  store_le<std::uint16_t>(data + kVersionAt, kVersion);
  store_le<std::uint64_t>(data + kGenerationAt, generation);
  store_le<std::uint64_t>(data + kRecordNbytesAt, record_nbytes);
  std::copy(key.begin(), key.end(), data + kKeyAt);
  store_le<std::uint32_t>(data + kRecordCrcAt,
                          crc32c(ConstBytes(data + kExtentHeaderNbytes, record_nbytes)));
  store_le<std::uint32_t>(data + kCrcAt, crc32c(ConstBytes(data, kCrcAt)));
  return extent.size();
}

bool is_extent_of(ConstBytes extent,
                  const BlockKey& key,
                  std::uint64_t generation,
                  std::uint64_t record_nbytes) {
  if (extent.size() < kExtentHeaderNbytes) {
    return false;
  }
  const std::uint8_t* data = extent.data();
  return std::memcmp(data, kMagic, sizeof(kMagic)) == 0 &&
         load_le<std::uint32_t>(data + kCrcAt) == crc32c(extent.sub(0, kCrcAt)) &&
         load_le<std::uint16_t>(data + kVersionAt) <= kVersion &&
         load_le<std::uint64_t>(data + kGenerationAt) == generation &&
         load_le<std::uint64_t>(data + kRecordNbytesAt) == record_nbytes &&
         std::equal(key.begin(), key.end(), data + kKeyAt) &&
         fits(kExtentHeaderNbytes, record_nbytes, extent.size());
}

}  // namespace kv
