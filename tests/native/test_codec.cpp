// SPDX-License-Identifier: Apache-2.0
// Records in buffers of exactly their size: round trips, truncation and damage, for an address
// checker to watch.
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/container.hpp"
#include "codec/record.hpp"
#include "core/crc32c.hpp"
#include "core/endian.hpp"
#include "core/paged.hpp"

namespace {

using Buffer = std::vector<std::uint8_t>;

kv::ConstBytes view(const Buffer& buffer) { return {buffer.data(), buffer.size()}; }
kv::Bytes view(Buffer& buffer) { return {buffer.data(), buffer.size()}; }
std::uint32_t checksum(const Buffer& buffer, std::uint32_t seed = 0) {
  return kv::crc32c(view(buffer), seed);
}

Buffer noise(std::size_t nbytes, unsigned seed) {
  std::mt19937 random(seed);
  Buffer buffer(nbytes);
  for (std::uint8_t& byte : buffer) {
    byte = static_cast<std::uint8_t>(random());
  }
  return buffer;
}

// Exponents of a few octaves, as models have them, with anything else in between.
Buffer likely_floats(const kv::BlockView& block, unsigned seed) {
  std::mt19937 random(seed);
  Buffer slot(block.geometry.slot_nbytes());
  const std::size_t itemsize = block.geometry.itemsize();
  const std::uint8_t exponent = block.dtype == kv::DType::kFloat16 ? 0x38 : 0x3E;
  for (std::size_t at = 0; at + itemsize <= slot.size(); at += itemsize) {
    for (std::size_t byte = 0; byte < itemsize; ++byte) {
      slot[at + byte] = static_cast<std::uint8_t>(random());
    }
    if (random() % 97 != 0) {
      slot[at + itemsize - 1] =
          static_cast<std::uint8_t>(exponent + random() % 2 + (random() % 2) * 0x80);
    }
  }
  return slot;
}

// A calibration whose planes have every kind of parameter.
Buffer calibration_bytes(const kv::Geometry& geometry) {
  Buffer bytes(32);
  std::memcpy(bytes.data(), "KVCL\1", 5);
  const std::size_t sizes[] = {geometry.num_layers(), geometry.kv_heads(), geometry.key_dim(),
                               geometry.value_dim()};
  for (std::size_t at = 0; at < 4; ++at) {
    kv::store_le<std::uint16_t>(bytes.data() + 24 + 2 * at, static_cast<std::uint16_t>(sizes[at]));
  }
  for (std::size_t plane = 0; plane < geometry.num_planes(); ++plane) {
    const std::size_t channels = geometry.kv_heads() * geometry.dim(plane);
    for (std::size_t head = 0; head < geometry.kv_heads(); ++head) {
      bytes.insert(bytes.end(), {0xF4, 0xFF});  // an rms of 2^(-12 / 8)
    }
    for (std::size_t channel = 0; channel < channels; ++channel) {
      bytes.insert(bytes.end(), {static_cast<std::uint8_t>(channel), 0x3D});
    }
    for (std::size_t channel = 0; channel < channels; ++channel) {
      bytes.push_back(static_cast<std::uint8_t>(channel % 40));
    }
    for (std::size_t channel = 0; channel < channels; ++channel) {
      bytes.push_back(static_cast<std::uint8_t>(channel % 24));
    }
    for (std::size_t channel = 0; channel < channels; ++channel) {
      bytes.push_back(static_cast<std::uint8_t>(channel * 7 % 251));
    }
    for (std::size_t channel = 0; channel < channels; ++channel) {
      bytes.push_back(static_cast<std::uint8_t>(channel % 16 - 8));
    }
    bytes.resize(kv::round_up(bytes.size(), 4));
  }
  kv::store_le<std::uint64_t>(bytes.data() + 16, bytes.size());
  kv::store_le<std::uint32_t>(bytes.data() + 8, checksum(bytes));
  return bytes;
}

// A profile with what it takes; the step of zstd is left out: streams are stored as they are.
struct Case {
  kv::Profile profile;
  bool is_calibrated;
  bool has_channel_values;
};

constexpr Case kCases[] = {
    {kv::Profile::kRaw, false, false}, {kv::Profile::kLossless, false, false},
    {kv::Profile::kQ8, false, false},  {kv::Profile::kQ8, true, true},
    {kv::Profile::kQ4, true, false},   {kv::Profile::kQ2, false, true},
};

Buffer encode(const kv::BlockView& block,
              const Buffer& slot,
              const Case& how,
              const kv::Calibration& calibration) {
  kv::WriterSettings settings;
  settings.profile = how.profile;
  settings.key_mult = how.profile == kv::Profile::kQ8 ? 32 : 8;
  settings.value_mult = settings.key_mult - 3;
  settings.has_channel_values = how.has_channel_values;
  settings.calibration = how.is_calibrated ? &calibration : nullptr;
  Buffer record(kv::record_bound(block));
  record.resize(kv::encode_record(block, settings, block.num_tokens % 2, view(slot), view(record)));
  record.shrink_to_fit();
  return record;
}

void decode(const kv::BlockView& block,
            const Buffer& record,
            const kv::Calibration& calibration,
            Buffer& slot) {
  const kv::RecordInfo info = kv::parse_header(view(record));
  const kv::RecordPart part{0, info.planes, info.segment_tokens, view(record), 0};
  CHECK(kv::open_planes(block, part).empty());
  std::vector<kv::TargetRows> targets;
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    targets.push_back(block.rows(slot.data(), plane));
  }
  const kv::Window all{0, block.geometry.kv_heads(), 0, block.num_tokens};
  kv::decode_planes(block, part, {}, &calibration, all, targets);
}

bool refuses(const kv::BlockView& block, const Buffer& record, const kv::Calibration& calibration) {
  Buffer slot(block.geometry.slot_nbytes());
  try {
    decode(block, record, calibration, slot);
  } catch (const kv::CorruptRecord&) {
    return true;
  } catch (const kv::UnsupportedFormat&) {
    return true;
  }
  return false;
}

// Makes the checksums right again: what a forger would do.
void seal(Buffer& record, std::size_t header_nbytes) {
  std::size_t offset = header_nbytes;
  for (std::size_t entry = kv::kHeaderNbytes; entry < header_nbytes; entry += kv::kEntryNbytes) {
    const auto nbytes = static_cast<std::size_t>(
        kv::round_up(kv::load_le<std::uint32_t>(record.data() + entry), kv::kPlaneAlignment));
    kv::store_le<std::uint32_t>(
        record.data() + entry + 4,
        kv::crc32c(kv::ConstBytes(record.data(), record.size()).sub(offset, nbytes)));
    offset += nbytes;
  }
  kv::store_le<std::uint32_t>(record.data() + 8,
                              kv::crc_without(kv::ConstBytes(record.data(), header_nbytes), 8));
}

// Returns the checksum of the record and of what was decoded from it.
std::uint32_t round_trips(const kv::BlockView& block,
                          const Case& how,
                          const kv::Calibration& calibration) {
  const Buffer slot = likely_floats(block, 1);
  const Buffer record = encode(block, slot, how, calibration);
  Buffer found(slot.size(), 0x77);
  decode(block, record, calibration, found);
  for (std::size_t plane = 0; plane < block.geometry.num_planes(); ++plane) {
    const std::size_t run = block.num_tokens * block.geometry.row_nbytes(plane);
    for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
      const std::size_t at =
          block.geometry.plane_offset(plane) + head * block.geometry.head_nbytes(plane);
      CHECK(how.profile >= kv::Profile::kQ8 || std::memcmp(&slot[at], &found[at], run) == 0);
      for (std::size_t spare = run; spare < block.geometry.head_nbytes(plane); ++spare) {
        CHECK(found[at + spare] == 0x77);
      }
    }
  }
  return checksum(found, checksum(record));
}

void refuses_truncation_and_damage(const kv::BlockView& block,
                                   const Case& how,
                                   const kv::Calibration& calibration) {
  const Buffer record = encode(block, likely_floats(block, 2), how, calibration);
  for (std::size_t length = 0; length < record.size(); ++length) {
    Buffer cut(record.begin(), record.begin() + static_cast<std::ptrdiff_t>(length));
    cut.shrink_to_fit();
    CHECK(refuses(block, cut, calibration));
  }
  const std::size_t header_nbytes = kv::parse_header(view(record)).header_nbytes();
  for (std::size_t bit = 0; bit < 8 * record.size(); ++bit) {
    Buffer damaged = record;
    damaged[bit / 8] = static_cast<std::uint8_t>(damaged[bit / 8] ^ (1U << (bit % 8)));
    CHECK(refuses(block, damaged, calibration));
    if (bit / 8 >= header_nbytes) {
      seal(damaged, header_nbytes);
      (void)refuses(block, damaged, calibration);  // either, but never a crash
    }
  }
}

void checksums_agree() {
  const Buffer data = noise(40000, 3);
  for (std::size_t nbytes = 0; nbytes < data.size(); nbytes += nbytes < 900 ? 1 : 997) {
    const kv::ConstBytes bytes(data.data() + nbytes % 7, nbytes - nbytes % 7);
    CHECK(kv::crc32c(bytes, 9) == kv::crc32c_table(bytes, 9));
  }
}

void paged_rows_round_trip() {
  const kv::Geometry geometry(2, 3, 5, 7, 2, 4);
  Buffer pool = noise(3 * geometry.slot_nbytes(), 4);
  const Buffer before = pool;
  const std::int32_t slots[] = {2, 0};
  const std::int32_t starts[] = {0, 4, 7};
  const kv::ConstBytes table(reinterpret_cast<const std::uint8_t*>(slots), sizeof(slots));
  const kv::ConstBytes rows(reinterpret_cast<const std::uint8_t*>(starts), sizeof(starts));
  for (std::size_t plane = 0; plane < geometry.num_planes(); ++plane) {
    const kv::PagedPlane params = kv::paged_plane(geometry, plane, pool.size());
    Buffer dense(7 * 3 * geometry.row_nbytes(plane));
    kv::move_paged_rows(kv::PagedMove::kGather, params, view(pool), table, rows, view(dense));
    kv::move_paged_rows(kv::PagedMove::kScatter, params, view(pool), table, rows, view(dense));
    CHECK(pool == before);
    Buffer wrong(dense.size() - 1);
    CHECK_THROWS(
        kv::move_paged_rows(kv::PagedMove::kGather, params, view(pool), table, rows, view(wrong)),
        kv::ShapeError);
  }
}

}  // namespace

unsigned test_codec() {
  std::uint32_t made = 0;
  const kv::CalibrationId id{1};
  checksums_agree();
  paged_rows_round_trip();
  for (const std::size_t tokens : {std::size_t{1}, std::size_t{3}, std::size_t{37}}) {
    for (const kv::DType dtype : {kv::DType::kBFloat16, kv::DType::kFloat16, kv::DType::kFloat32}) {
      const kv::Geometry geometry(3, 2, 37, 70, kv::itemsize_of(dtype), 39);
      const kv::Calibration calibration(
          view(static_cast<const Buffer&>(calibration_bytes(geometry))), id);
      const kv::BlockView block(geometry, dtype, tokens);
      for (const Case& how : kCases) {
        made = 31 * made + round_trips(block, how, calibration);
      }
    }
  }
  const kv::Geometry small(1, 1, 16, 12, 2, 20);
  const kv::Calibration calibration(view(static_cast<const Buffer&>(calibration_bytes(small))), id);
  for (const Case& how : kCases) {
    refuses_truncation_and_damage(kv::BlockView(small, kv::DType::kBFloat16, 19), how, calibration);
  }
  CHECK_THROWS(kv::Geometry(0, 1, 1, 1, 2, 1), kv::ShapeError);
  CHECK_THROWS(kv::BlockView(kv::Geometry(1, 1, 1, 1, 2, 4), kv::DType::kFloat32, 1),
               kv::ShapeError);
  return made;
}
