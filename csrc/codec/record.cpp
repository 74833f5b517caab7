// SPDX-License-Identifier: Apache-2.0
// Encodes, verifies and decodes planes, one coding at a time.
#include "codec/record.hpp"

#include <cstring>
#include <string>

#include "codec/byte_split.hpp"
#include "codec/quantize.hpp"
#include "core/crc32c.hpp"
#include "core/endian.hpp"

namespace kv {
namespace {

constexpr std::size_t kLengthNbytes = sizeof(std::uint32_t);

void check_slot(const BlockView& block, std::size_t slot_nbytes) {
  KV_EXPECT(slot_nbytes == block.geometry.slot_nbytes(), ShapeError,
            "slot has " + std::to_string(slot_nbytes) + " bytes; this layout's slots have " +
                std::to_string(block.geometry.slot_nbytes()));
}

// Walks the stored streams of encode_record's argument, plane after plane.
class StreamCursor {
 public:
  explicit StreamCursor(const std::vector<ConstBytes>& streams) : streams_(streams) {}

  const ConstBytes* take(std::size_t count) {
    KV_EXPECT(
        count <= streams_.size() - next_, ShapeError,
        "only " + std::to_string(streams_.size()) + " streams for the planes of coding split");
    const ConstBytes* first = streams_.data() + next_;
    next_ += count;
    return first;
  }
  void expect_end() const {
    KV_EXPECT(next_ == streams_.size(), ShapeError,
              std::to_string(streams_.size()) + " streams; the planes of coding split take " +
                  std::to_string(next_));
  }

 private:
  const std::vector<ConstBytes>& streams_;
  std::size_t next_ = 0;
};

void write_raw(const BlockView& block, ConstBytes slot, std::size_t plane, std::uint8_t* out) {
  const std::size_t run_nbytes = block.run_nbytes(plane);
  for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
    std::memcpy(out + head * run_nbytes, slot.data() + block.run_offset(plane, head), run_nbytes);
  }
}

void write_q8(const BlockView& block, ConstBytes slot, std::size_t plane, std::uint8_t* out) {
  const std::size_t dim = block.geometry.dim(plane);
  std::uint8_t* codes = out + block.rows() * sizeof(float);
  for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
    const std::uint8_t* run = slot.data() + block.run_offset(plane, head);
    KV_EXPECT(all_finite(run, block.num_tokens * dim, block.dtype), ShapeError,
              plane_name(plane) + " holds an infinity or a NaN, which q8 cannot store");
    quantize_rows(run, block.num_tokens, dim, block.dtype,
                  out + head * block.num_tokens * sizeof(float),
                  codes + head * block.num_tokens * dim);
  }
}

// Stored length of a split plane, checked so that a reader will accept it.
std::uint64_t split_nbytes(const BlockView& block, std::size_t plane, const ConstBytes* streams) {
  std::uint64_t nbytes = block.geometry.itemsize() * kLengthNbytes;
  for (std::size_t stream = 0; stream < block.geometry.itemsize(); ++stream) {
    KV_EXPECT(streams[stream].size() > 0 && streams[stream].size() <= block.elements(plane),
              ShapeError,
              "a stream of " + std::to_string(streams[stream].size()) + " bytes for " +
                  plane_name(plane) + ", which has " + std::to_string(block.elements(plane)) +
                  " elements");
    nbytes += streams[stream].size();
  }
  return nbytes;
}

void write_split(const BlockView& block, const ConstBytes* streams, std::uint8_t* out) {
  const std::size_t itemsize = block.geometry.itemsize();
  std::uint8_t* at = out + itemsize * kLengthNbytes;
  for (std::size_t stream = 0; stream < itemsize; ++stream) {
    const std::size_t nbytes = streams[stream].size();
    store_le<std::uint32_t>(out + stream * kLengthNbytes, static_cast<std::uint32_t>(nbytes));
    std::memcpy(at, streams[stream].data(), nbytes);
    at += nbytes;
  }
}

RecordInfo info_of(const BlockView& block, Profile profile, std::uint64_t first_token) {
  RecordInfo info;
  info.dtype = block.dtype;
  info.profile = profile;
  info.num_layers = block.geometry.num_layers();
  info.kv_heads = block.geometry.kv_heads();
  info.key_dim = block.geometry.key_dim();
  info.value_dim = block.geometry.value_dim();
  info.num_tokens = block.num_tokens;
  info.first_token = first_token;
  info.planes.resize(block.geometry.num_planes());
  return info;
}

PlaneEntry encode_plane(const BlockView& block,
                        ConstBytes slot,
                        std::size_t plane,
                        Coding coding,
                        StreamCursor& streams,
                        std::uint64_t offset,
                        Bytes out) {
  const std::size_t itemsize = block.geometry.itemsize();
  const ConstBytes* taken = coding == Coding::kSplit ? streams.take(itemsize) : nullptr;
  PlaneEntry entry;
  entry.offset = offset;
  entry.coding = coding;
  entry.raw_nbytes = block.elements(plane) * itemsize;
  entry.nbytes = taken != nullptr
                     ? split_nbytes(block, plane, taken)
                     : fixed_nbytes(coding, block.rows(), block.geometry.dim(plane), itemsize);
  KV_EXPECT(coding == Coding::kRaw || entry.nbytes < entry.raw_nbytes, ShapeError,
            plane_name(plane) + " does not shrink: it must be stored raw");
  const Bytes stored = out.sub(offset, entry.padded_nbytes());
  switch (coding) {
    case Coding::kRaw:
      write_raw(block, slot, plane, stored.data());
      break;
    case Coding::kSplit:
      write_split(block, taken, stored.data());
      break;
    case Coding::kQ8:
      write_q8(block, slot, plane, stored.data());
      break;
  }
  std::memset(stored.data() + entry.nbytes, 0, stored.size() - entry.nbytes);
  entry.crc32c = crc32c(ConstBytes(stored.data(), stored.size()));
  return entry;
}

// Lists the streams of one split plane; its checksum is known to match, its lengths are not
// trusted.
void list_streams(const BlockView& block,
                  std::size_t plane,
                  ConstBytes stored,
                  std::uint64_t offset,
                  std::vector<StoredStream>& streams) {
  const std::size_t table_nbytes = block.geometry.itemsize() * kLengthNbytes;
  KV_EXPECT(stored.size() > table_nbytes, CorruptRecord,
            plane_name(plane) + " has no room for its stream lengths");
  std::uint64_t at = table_nbytes;
  for (std::size_t stream = 0; stream < block.geometry.itemsize(); ++stream) {
    const std::uint64_t nbytes = load_le<std::uint32_t>(stored.data() + stream * kLengthNbytes);
    KV_EXPECT(nbytes > 0 && nbytes <= block.elements(plane) && fits(at, nbytes, stored.size()),
              CorruptRecord,
              "stream " + std::to_string(stream) + " of " + plane_name(plane) + " states " +
                  std::to_string(nbytes) + " bytes, which is not possible");
    streams.push_back(StoredStream{offset + at, nbytes});
    at += nbytes;
  }
  KV_EXPECT(at == stored.size(), CorruptRecord,
            plane_name(plane) + " has bytes that belong to no stream");
}

void check_part(const BlockView& block, const RecordPart& part) {
  KV_EXPECT(fits(part.first_plane, part.planes.size(), block.geometry.num_planes()), ShapeError,
            "planes " + std::to_string(part.first_plane) + " to " +
                std::to_string(part.first_plane + part.planes.size()) + " of " +
                std::to_string(block.geometry.num_planes()));
  for (std::size_t index = 0; index < part.planes.size(); ++index) {
    const std::size_t plane = part.first_plane + index;
    const PlaneEntry& entry = part.planes[index];
    check_entry(entry, plane, block.rows(), block.geometry.dim(plane), block.geometry.itemsize());
    KV_EXPECT(entry.offset >= part.data_offset, ShapeError,
              plane_name(plane) + " begins at " + std::to_string(entry.offset) +
                  ", before the data at " + std::to_string(part.data_offset));
    KV_EXPECT(fits(entry.offset - part.data_offset, entry.padded_nbytes(), part.data.size()),
              CorruptRecord,
              "record is cut off: " + plane_name(plane) + " ends beyond the " +
                  std::to_string(part.data.size()) + " bytes at hand");
  }
}

ConstBytes stored_bytes(const RecordPart& part, const PlaneEntry& entry) {
  return part.data.sub(entry.offset - part.data_offset, entry.nbytes);
}

void read_raw(const BlockView& block, std::size_t plane, ConstBytes stored, Bytes slot) {
  const std::size_t run_nbytes = block.run_nbytes(plane);
  for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
    std::memcpy(slot.data() + block.run_offset(plane, head), stored.data() + head * run_nbytes,
                run_nbytes);
  }
}

void read_split(const BlockView& block, std::size_t plane, const ConstBytes* streams, Bytes slot) {
  const std::size_t itemsize = block.geometry.itemsize();
  const std::size_t run = block.num_tokens * block.geometry.dim(plane);
  for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
    ConstStreams at{};
    for (std::size_t stream = 0; stream < itemsize; ++stream) {
      at[stream] = streams[stream].data() + head * run;
    }
    merge_bytes(at, run, itemsize, slot.data() + block.run_offset(plane, head));
  }
}

void read_q8(const BlockView& block, std::size_t plane, ConstBytes stored, Bytes slot) {
  const std::size_t dim = block.geometry.dim(plane);
  const std::uint8_t* codes = stored.data() + block.rows() * sizeof(float);
  for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
    const bool is_valid =
        dequantize_rows(stored.data() + head * block.num_tokens * sizeof(float),
                        codes + head * block.num_tokens * dim, block.num_tokens, dim, block.dtype,
                        slot.data() + block.run_offset(plane, head));
    KV_EXPECT(is_valid, CorruptRecord,
              plane_name(plane) + " holds a q8 scale or code out of range");
  }
}

}  // namespace

BlockView::BlockView(const Geometry& geometry_in, DType dtype_in, std::uint64_t num_tokens_in)
    : geometry(geometry_in), dtype(dtype_in), num_tokens(static_cast<std::size_t>(num_tokens_in)) {
  KV_EXPECT(itemsize_of(dtype) == geometry.itemsize(), ShapeError,
            "dtype has items of " + std::to_string(itemsize_of(dtype)) + " bytes, the layout of " +
                std::to_string(geometry.itemsize()));
  KV_EXPECT(num_tokens_in >= 1 && num_tokens_in <= geometry.block_tokens(), ShapeError,
            "num_tokens is " + std::to_string(num_tokens_in) + "; a slot has room for 1 to " +
                std::to_string(geometry.block_tokens()));
}

std::size_t record_bound(const BlockView& block) noexcept {
  std::size_t layer_nbytes = 2 * kEntryNbytes;
  for (const std::size_t plane : {std::size_t{0}, std::size_t{1}}) {
    layer_nbytes += static_cast<std::size_t>(
        round_up(block.elements(plane) * block.geometry.itemsize(), kPlaneAlignment));
  }
  return kHeaderNbytes + block.geometry.num_layers() * layer_nbytes;
}

std::vector<std::size_t> nonfinite_planes(const BlockView& block, ConstBytes slot) {
  check_slot(block, slot.size());
  std::vector<std::size_t> found;
  for (std::size_t plane = 0; plane < block.geometry.num_planes(); ++plane) {
    const std::size_t run = block.num_tokens * block.geometry.dim(plane);
    for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
      if (!all_finite(slot.data() + block.run_offset(plane, head), run, block.dtype)) {
        found.push_back(plane);
        break;
      }
    }
  }
  return found;
}

void split_planes(const BlockView& block,
                  ConstBytes slot,
                  const std::vector<std::size_t>& planes,
                  Bytes streams) {
  check_slot(block, slot.size());
  const std::size_t itemsize = block.geometry.itemsize();
  std::uint64_t offset = 0;
  for (const std::size_t plane : planes) {
    KV_EXPECT(
        plane < block.geometry.num_planes(), ShapeError,
        "plane " + std::to_string(plane) + " of " + std::to_string(block.geometry.num_planes()));
    const std::size_t elements = block.elements(plane);
    const Bytes room = streams.sub(offset, elements * itemsize);
    offset += room.size();
    const std::size_t run = block.num_tokens * block.geometry.dim(plane);
    for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
      Streams at{};
      for (std::size_t stream = 0; stream < itemsize; ++stream) {
        at[stream] = room.data() + stream * elements + head * run;
      }
      split_bytes(slot.data() + block.run_offset(plane, head), run, itemsize, at);
    }
  }
}

std::size_t encode_record(const BlockView& block,
                          Profile profile,
                          std::uint64_t first_token,
                          ConstBytes slot,
                          const std::vector<Coding>& codings,
                          const std::vector<ConstBytes>& streams,
                          Bytes out) {
  check_slot(block, slot.size());
  RecordInfo info = info_of(block, profile, first_token);
  KV_EXPECT(codings.size() == info.planes.size(), ShapeError,
            std::to_string(codings.size()) + " codings for " + std::to_string(info.planes.size()) +
                " planes");
  StreamCursor cursor(streams);
  std::uint64_t offset = info.header_nbytes();
  for (std::size_t plane = 0; plane < codings.size(); ++plane) {
    KV_EXPECT(static_cast<unsigned>(codings[plane]) <= static_cast<unsigned>(profile), ShapeError,
              plane_name(plane) + " has a coding that its profile does not allow");
    info.planes[plane] = encode_plane(block, slot, plane, codings[plane], cursor, offset, out);
    offset += info.planes[plane].padded_nbytes();
  }
  cursor.expect_end();
  info.total_nbytes = offset;
  write_header(info, out);
  return static_cast<std::size_t>(offset);
}

std::vector<StoredStream> open_planes(const BlockView& block, const RecordPart& part) {
  check_part(block, part);
  std::vector<StoredStream> streams;
  for (std::size_t index = 0; index < part.planes.size(); ++index) {
    const std::size_t plane = part.first_plane + index;
    const PlaneEntry& entry = part.planes[index];
    const std::uint64_t offset = entry.offset - part.data_offset;
    KV_EXPECT(crc32c(part.data.sub(offset, entry.padded_nbytes())) == entry.crc32c, CorruptRecord,
              plane_name(plane) + " is damaged: its checksum does not match");
    if (entry.coding == Coding::kSplit) {
      list_streams(block, plane, stored_bytes(part, entry), offset, streams);
    }
  }
  return streams;
}

void decode_planes(const BlockView& block,
                   const RecordPart& part,
                   const std::vector<ConstBytes>& streams,
                   Bytes slot) {
  check_slot(block, slot.size());
  check_part(block, part);
  StreamCursor cursor(streams);
  for (std::size_t index = 0; index < part.planes.size(); ++index) {
    const std::size_t plane = part.first_plane + index;
    const ConstBytes stored = stored_bytes(part, part.planes[index]);
    switch (part.planes[index].coding) {
      case Coding::kRaw:
        read_raw(block, plane, stored, slot);
        break;
      case Coding::kSplit: {
        const ConstBytes* taken = cursor.take(block.geometry.itemsize());
        for (std::size_t stream = 0; stream < block.geometry.itemsize(); ++stream) {
          KV_EXPECT(taken[stream].size() == block.elements(plane), ShapeError,
                    "a decompressed stream of " + std::to_string(taken[stream].size()) +
                        " bytes; " + plane_name(plane) + " needs " +
                        std::to_string(block.elements(plane)));
        }
        read_split(block, plane, taken, slot);
        break;
      }
      case Coding::kQ8:
        read_q8(block, plane, stored, slot);
        break;
    }
  }
  cursor.expect_end();
}

}  // namespace kv
