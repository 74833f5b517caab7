// SPDX-License-Identifier: Apache-2.0
// Samples: how they are cut, and how their checksums are made right.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/crc32c.hpp"
#include "fuzz/targets.hpp"

namespace kv::fuzz {

namespace {

constexpr std::size_t kCrcAt = 8;
constexpr std::size_t kHeaderNbytes = 64;
constexpr std::size_t kLayersAt = 30;
constexpr std::size_t kEntryNbytes = 16;
constexpr std::size_t kEntryCrcAt = 4;
constexpr std::size_t kCalibrationHeaderNbytes = 32;

std::uint32_t load32(const Buffer& buffer, std::size_t at) {
  std::uint32_t value = 0;
  std::memcpy(&value, buffer.data() + at, sizeof value);
  return value;
}

void store32(Buffer& buffer, std::size_t at, std::uint32_t value) {
  std::memcpy(buffer.data() + at, &value, sizeof value);
}

std::uint32_t crc_of(const Buffer& buffer, std::size_t at, std::size_t nbytes) {
  return crc32c(ConstBytes{buffer.data() + at, nbytes});
}

void seal_first(Buffer& buffer, std::size_t nbytes) {
  store32(buffer, kCrcAt, 0);
  store32(buffer, kCrcAt, crc_of(buffer, 0, nbytes));
}

}  // namespace

Sample Sample::from(ConstBytes data) {
  std::size_t split = 0;
  std::size_t nbytes = 0;
  if (data.size() >= sizeof(std::uint32_t)) {
    std::uint32_t stated = 0;
    std::memcpy(&stated, data.data(), sizeof stated);
    split = sizeof stated;
    nbytes = stated <= data.size() - split ? stated : 0;
  }
  const std::uint8_t* begin = data.data() + split;
  return Sample{Buffer(begin, begin + nbytes), Buffer(begin + nbytes, data.data() + data.size())};
}

void Sample::seal() {
  seal_calibration(calibration);
  if (record.size() < kHeaderNbytes) {
    return;
  }
  const std::size_t layers = record[kLayersAt] | std::size_t{record[kLayersAt + 1]} << 8U;
  const std::size_t header_nbytes =
      std::min(record.size(), kHeaderNbytes + 2 * layers * kEntryNbytes);
  std::size_t offset = header_nbytes;
  for (std::size_t entry = kHeaderNbytes; entry + kEntryNbytes <= header_nbytes;
       entry += kEntryNbytes) {
    const std::uint64_t padded = round_up(load32(record, entry), kEntryNbytes);
    if (padded > record.size() - offset) {
      break;
    }
    store32(record, entry + kEntryCrcAt, crc_of(record, offset, padded));
    offset += padded;
  }
  seal_first(record, header_nbytes);
}

void seal_calibration(Buffer& object) {
  if (object.size() >= kCalibrationHeaderNbytes) {
    seal_first(object, object.size());
  }
}

void expect(bool is_kept, const char* promise) {
  if (!is_kept) {
    std::fprintf(stderr, "broken: %s\n", promise);
    std::abort();
  }
}

void at_all_levels(const std::function<void(SimdLevel)>& run) {
  for (int level = 0; level <= static_cast<int>(cpu_features().simd_level); ++level) {
    limit_simd(static_cast<SimdLevel>(level));
    run(static_cast<SimdLevel>(level));
  }
}

}  // namespace kv::fuzz
