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
#include "core/paged.hpp"

namespace {

using Buffer = std::vector<std::uint8_t>;

kv::ConstBytes view(const Buffer& buffer) { return {buffer.data(), buffer.size()}; }
kv::Bytes view(Buffer& buffer) { return {buffer.data(), buffer.size()}; }

Buffer noise(std::size_t nbytes, unsigned seed) {
  std::mt19937 random(seed);
  Buffer buffer(nbytes);
  for (std::uint8_t& byte : buffer) {
    byte = static_cast<std::uint8_t>(random());
  }
  return buffer;
}

// Stores the upper streams as they are and pretends that the lowest one was compressed to one byte,
// so that the plane shrinks: without zstd, the reader's streams are handed over from here.
struct Record {
  Buffer bytes;
  Buffer streams;
};

Record encode(const kv::BlockView& block,
              const Buffer& slot,
              kv::Coding coding,
              kv::Profile profile) {
  const std::size_t planes = block.geometry.num_planes();
  const std::size_t itemsize = block.geometry.itemsize();
  std::vector<std::size_t> all(planes);
  std::size_t total = 0;
  for (std::size_t plane = 0; plane < planes; ++plane) {
    all[plane] = plane;
    total += block.elements(plane) * itemsize;
  }
  Record record{Buffer(kv::record_bound(block)), Buffer(total)};
  kv::split_planes(block, view(slot), all, view(record.streams));
  std::vector<kv::ConstBytes> stored;
  if (coding == kv::Coding::kSplit) {
    const std::uint8_t* at = record.streams.data();
    for (std::size_t plane = 0; plane < planes; ++plane) {
      for (std::size_t stream = 0; stream < itemsize; ++stream) {
        stored.emplace_back(at, stream == 0 ? 1 : block.elements(plane));
        at += block.elements(plane);
      }
    }
  }
  const std::size_t nbytes =
      kv::encode_record(block, profile, 5, view(slot), std::vector<kv::Coding>(planes, coding),
                        stored, view(record.bytes));
  record.bytes.resize(nbytes);
  record.bytes.shrink_to_fit();
  return record;
}

void decode(const kv::BlockView& block, const Record& record, Buffer& slot) {
  const kv::RecordInfo info = kv::parse_header(view(record.bytes));
  const kv::RecordPart part{0, info.planes, view(record.bytes), 0};
  const std::size_t count = kv::open_planes(block, part).size();
  std::vector<kv::ConstBytes> streams;
  const std::uint8_t* at = record.streams.data();
  for (std::size_t index = 0; index < count; ++index) {
    const std::size_t elements = block.elements(index / block.geometry.itemsize());
    streams.emplace_back(at, elements);
    at += elements;
  }
  kv::decode_planes(block, part, streams, view(slot));
}

bool refuses(const kv::BlockView& block, const Record& record) {
  Buffer slot(block.geometry.slot_nbytes());
  try {
    decode(block, record, slot);
  } catch (const kv::CorruptRecord&) {
    return true;
  } catch (const kv::UnsupportedFormat&) {
    return true;
  }
  return false;
}

Buffer small_floats(std::size_t nbytes, std::size_t itemsize, unsigned seed) {
  Buffer slot = noise(nbytes, seed);
  for (std::size_t at = itemsize - 1; at < nbytes; at += itemsize) {
    slot[at] &= 0xBFU;  // exponents below one: all finite
  }
  return slot;
}

// Returns the checksum of the record and of what was decoded from it.
std::uint32_t round_trips(const kv::BlockView& block, kv::Coding coding, kv::Profile profile) {
  const Buffer slot = small_floats(block.geometry.slot_nbytes(), block.geometry.itemsize(), 1);
  const Record record = encode(block, slot, coding, profile);
  Buffer found(slot.size(), 0x77);
  decode(block, record, found);
  for (std::size_t plane = 0; plane < block.geometry.num_planes(); ++plane) {
    for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
      const std::size_t at = block.run_offset(plane, head);
      const std::size_t run = block.run_nbytes(plane);
      CHECK(coding == kv::Coding::kQ8 || std::memcmp(&slot[at], &found[at], run) == 0);
      for (std::size_t spare = run; spare < block.geometry.head_nbytes(plane); ++spare) {
        CHECK(found[at + spare] == 0x77);
      }
    }
  }
  return kv::crc32c(kv::ConstBytes(found.data(), found.size()),
                    kv::crc32c(kv::ConstBytes(record.bytes.data(), record.bytes.size())));
}

void refuses_truncation_and_damage(const kv::BlockView& block,
                                   kv::Coding coding,
                                   kv::Profile profile) {
  const Buffer slot = small_floats(block.geometry.slot_nbytes(), block.geometry.itemsize(), 2);
  const Record record = encode(block, slot, coding, profile);
  for (std::size_t length = 0; length < record.bytes.size(); ++length) {
    Record cut{
        Buffer(record.bytes.begin(), record.bytes.begin() + static_cast<std::ptrdiff_t>(length)),
        record.streams};
    cut.bytes.shrink_to_fit();
    CHECK(refuses(block, cut));
  }
  for (std::size_t bit = 0; bit < 8 * record.bytes.size(); ++bit) {
    Record damaged = record;
    damaged.bytes[bit / 8] = static_cast<std::uint8_t>(damaged.bytes[bit / 8] ^ (1U << (bit % 8)));
    CHECK(refuses(block, damaged));
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
  checksums_agree();
  paged_rows_round_trip();
  for (const std::size_t tokens : {std::size_t{1}, std::size_t{3}, std::size_t{17}}) {
    for (const kv::DType dtype : {kv::DType::kBFloat16, kv::DType::kFloat16, kv::DType::kFloat32}) {
      const kv::Geometry geometry(2, 2, 37, 9, kv::itemsize_of(dtype), 19);
      const kv::BlockView block(geometry, dtype, tokens);
      made = 31 * made + round_trips(block, kv::Coding::kRaw, kv::Profile::kRaw);
      made = 31 * made + round_trips(block, kv::Coding::kSplit, kv::Profile::kLossless);
      made = 31 * made + round_trips(block, kv::Coding::kQ8, kv::Profile::kQ8);
    }
  }
  const kv::BlockView small(kv::Geometry(1, 1, 16, 12, 2, 3), kv::DType::kBFloat16, 2);
  refuses_truncation_and_damage(small, kv::Coding::kRaw, kv::Profile::kRaw);
  refuses_truncation_and_damage(small, kv::Coding::kSplit, kv::Profile::kLossless);
  refuses_truncation_and_damage(small, kv::Coding::kQ8, kv::Profile::kQ8);
  CHECK_THROWS(kv::Geometry(0, 1, 1, 1, 2, 1), kv::ShapeError);
  CHECK_THROWS(kv::BlockView(kv::Geometry(1, 1, 1, 1, 2, 4), kv::DType::kFloat32, 1),
               kv::ShapeError);
  return made;
}
