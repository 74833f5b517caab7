// SPDX-License-Identifier: Apache-2.0
// The reader of records: checks first, then every plane by its coding.
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "codec/groups.hpp"
#include "codec/record.hpp"
#include "core/crc32c.hpp"
#include "core/endian.hpp"
#include "elements/byte_split.hpp"
#include "elements/whole_lines.hpp"
#include "planes/exponent_plane.hpp"
#include "planes/quantised_plane.hpp"

namespace kv {
namespace {

constexpr std::size_t kLengthNbytes = 4;
// Enough K and V planes for segments to be read in lock step; more would not fit the cache.
constexpr std::size_t kPlanesTogether = 2 * kMaxReaders;

// Lists the streams of one split plane; its checksum is known to match, its lengths are not
// trusted.
void list_streams(const PlaneShape& shape,
                  std::size_t plane,
                  ConstBytes stored,
                  std::uint64_t offset,
                  std::vector<StoredStream>& streams) {
  const std::size_t table_nbytes = shape.itemsize() * kLengthNbytes;
  KV_EXPECT(stored.size() > table_nbytes, CorruptRecord,
            plane_name(plane) + " has no room for its stream lengths");
  std::uint64_t at = table_nbytes;
  for (std::size_t stream = 0; stream < shape.itemsize(); ++stream) {
    const std::uint64_t nbytes = load_le<std::uint32_t>(stored.data() + stream * kLengthNbytes);
    KV_EXPECT(nbytes > 0 && nbytes <= shape.elements() && fits(at, nbytes, stored.size()),
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
    check_entry(entry, plane, block.shape(plane, part.segment_tokens));
    KV_EXPECT(entry.offset >= part.data_offset, ShapeError,
              plane_name(plane) + " begins at " + std::to_string(entry.offset) +
                  ", before the data at " + std::to_string(part.data_offset));
    KV_EXPECT(fits(entry.offset - part.data_offset, entry.padded_nbytes(), part.data.size()),
              CorruptRecord,
              "record is cut off: " + plane_name(plane) + " ends beyond the " +
                  std::to_string(part.data.size()) + " bytes at hand");
  }
  KV_EXPECT(part.num_leading <= part.planes.size(), ShapeError,
            std::to_string(part.num_leading) + " leading planes of " +
                std::to_string(part.planes.size()));
}

void check_window(const BlockView& block, const Window& window) {
  KV_EXPECT(fits(window.first_head, window.num_heads, block.geometry.kv_heads()) &&
                fits(window.first_token, window.num_tokens, block.num_tokens),
            ShapeError,
            "heads and tokens beyond the block's " + std::to_string(block.geometry.kv_heads()) +
                " heads and " + std::to_string(block.num_tokens) + " tokens");
}

ConstBytes stored_bytes(const RecordPart& part, const PlaneEntry& entry) {
  return part.data.sub(entry.offset - part.data_offset, entry.nbytes);
}

// Calls `copy` for every run of wanted rows that is contiguous at both ends: first element, count,
// destination.
template <typename Copy>
void for_each_run(const PlaneShape& shape, const WindowTarget& target, const Copy& copy) {
  const Window& window = target.window;
  const bool is_dense = target.rows.token_stride == static_cast<std::ptrdiff_t>(shape.row_nbytes());
  const std::size_t run = is_dense ? window.num_tokens : 1;
  for (std::size_t at = 0; at < window.num_heads; ++at) {
    const std::size_t head = window.first_head + at;
    for (std::size_t token = 0; token < window.num_tokens; token += run) {
      const std::size_t first = (head * shape.tokens + window.first_token + token) * shape.dim;
      copy(first, run * shape.dim, target.rows.row(at, token));
    }
  }
}

void read_raw(const PlaneShape& shape, ConstBytes stored, const WindowTarget& target) {
  for_each_run(shape, target, [&](std::size_t first, std::size_t count, std::uint8_t* to) {
    std::memcpy(to, stored.data() + first * shape.itemsize(), count * shape.itemsize());
  });
}

void read_split(const PlaneShape& shape, const ConstBytes* streams, const WindowTarget& target) {
  for_each_run(shape, target, [&](std::size_t first, std::size_t count, std::uint8_t* to) {
    ConstStreams at{};
    for (std::size_t stream = 0; stream < shape.itemsize(); ++stream) {
      at[stream] = streams[stream].data() + first;
    }
    merge_bytes(at, count, shape.itemsize(), to);
  });
}

// Returns the streams of one split plane, and moves on.
const ConstBytes* take_streams(const std::vector<ConstBytes>& streams,
                               const PlaneShape& shape,
                               std::size_t plane,
                               std::size_t& next) {
  KV_EXPECT(shape.itemsize() <= streams.size() - next, ShapeError,
            "only " + std::to_string(streams.size()) + " streams for the planes of coding split");
  const ConstBytes* taken = streams.data() + next;
  next += shape.itemsize();
  for (std::size_t stream = 0; stream < shape.itemsize(); ++stream) {
    KV_EXPECT(taken[stream].size() == shape.elements(), ShapeError,
              "a decompressed stream of " + std::to_string(taken[stream].size()) + " bytes; " +
                  plane_name(plane) + " needs " + std::to_string(shape.elements()));
  }
  return taken;
}

// Entropy-coded planes that wait for enough others to be read with.
class PendingPlanes {
 public:
  void add(std::unique_ptr<PlaneReader> reader, const WindowTarget& target) {
    readers_.push_back(std::move(reader));
    jobs_.push_back(PlaneJob{readers_.back().get(), target});
    if (jobs_.size() == kPlanesTogether) {
      read();
    }
  }
  void read() {
    read_planes(jobs_);
    jobs_.clear();
    readers_.clear();
  }

 private:
  std::vector<std::unique_ptr<PlaneReader>> readers_;
  std::vector<PlaneJob> jobs_;
};

// A group that is being read, and the places of its planes in the part.
struct OpenGroup {
  std::unique_ptr<BasisReader> reader;
  std::size_t holder;
  std::size_t layers;
};

OpenGroup open_group(const BlockView& block,
                     const RecordPart& part,
                     const Calibration* calibration,
                     const Window& window,
                     std::size_t holder) {
  const std::size_t plane = part.first_plane + holder;
  KV_EXPECT(calibration != nullptr, ShapeError,
            plane_name(plane) + " needs the calibration it was written with");
  const PlaneEntry& entry = part.planes[holder];
  const GroupShape shape =
      group_shape(*calibration, plane, block.shape(plane, part.segment_tokens));
  return OpenGroup{open_basis_group(shape, entry, stored_bytes(part, entry), window), holder,
                   shape.basis->layers};
}

void decode_groups(const BlockView& block,
                   const RecordPart& part,
                   const std::vector<std::size_t>& holders,
                   const Calibration* calibration,
                   const Window& window,
                   const std::vector<TargetRows>& targets) {
  // The wanted planes of a group, by the place of the one with its bytes.
  std::map<std::size_t, std::vector<std::size_t>> wanted;
  for (std::size_t index = part.num_leading; index < part.planes.size(); ++index) {
    if (part.planes[index].coding == Coding::kBasis) {
      wanted[holders[index]].push_back(index);
    }
  }
  std::vector<OpenGroup> open;
  std::vector<PlaneJob> jobs;
  for (const auto& [holder, planes] : wanted) {
    open.push_back(open_group(block, part, calibration, window, holder));
    KV_EXPECT((planes.back() - holder) / 2 < open.back().layers, CorruptRecord,
              plane_name(part.first_plane + planes.back()) +
                  " has no bytes, and its calibration does not count it to the group before");
    jobs.push_back(open.back().reader->job());
  }
  read_planes(jobs);
  for (const OpenGroup& group : open) {
    group.reader->gather();
    for (const std::size_t index : wanted[group.holder]) {
      group.reader->restore((index - group.holder) / 2, targets[index - part.num_leading]);
    }
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

void check_slot(const BlockView& block, std::size_t nbytes) {
  KV_EXPECT(nbytes == block.geometry.slot_nbytes(), ShapeError,
            "a slot has " + std::to_string(block.geometry.slot_nbytes()) + " bytes, not " +
                std::to_string(nbytes));
}

void check_calibration(const BlockView& block, const Calibration* calibration) {
  const Geometry& geometry = block.geometry;
  KV_EXPECT(calibration == nullptr || (calibration->num_layers() == geometry.num_layers() &&
                                       calibration->kv_heads() == geometry.kv_heads() &&
                                       calibration->key_dim() == geometry.key_dim() &&
                                       calibration->value_dim() == geometry.value_dim()),
            ShapeError, "the calibration is of another geometry");
}

std::vector<StoredStream> open_planes(const BlockView& block, const RecordPart& part) {
  check_part(block, part);
  const std::vector<std::size_t> holders = holders_of(part.planes, part.first_plane);
  std::vector<bool> is_needed(part.planes.size(), false);
  for (std::size_t index = part.num_leading; index < part.planes.size(); ++index) {
    is_needed[index] = true;
    is_needed[holders[index]] = true;
  }
  std::vector<StoredStream> streams;
  for (std::size_t index = 0; index < part.planes.size(); ++index) {
    if (!is_needed[index]) {
      continue;
    }
    const std::size_t plane = part.first_plane + index;
    const PlaneEntry& entry = part.planes[index];
    const std::uint64_t offset = entry.offset - part.data_offset;
    KV_EXPECT(crc32c(part.data.sub(offset, entry.padded_nbytes())) == entry.crc32c, CorruptRecord,
              plane_name(plane) + " is damaged: its checksum does not match");
    if (entry.coding == Coding::kSplit) {
      list_streams(block.shape(plane, part.segment_tokens), plane, stored_bytes(part, entry),
                   offset, streams);
    }
  }
  return streams;
}

void decode_planes(const BlockView& block,
                   const RecordPart& part,
                   const std::vector<ConstBytes>& streams,
                   const Calibration* calibration,
                   const Window& window,
                   const std::vector<TargetRows>& targets) {
  check_part(block, part);
  const std::vector<std::size_t> holders = holders_of(part.planes, part.first_plane);
  check_window(block, window);
  check_calibration(block, calibration);
  KV_EXPECT(targets.size() == part.num_wanted(), ShapeError,
            std::to_string(targets.size()) + " targets for " + std::to_string(part.num_wanted()) +
                " planes");
  PendingPlanes pending;
  std::size_t next_stream = 0;
  for (std::size_t index = part.num_leading; index < part.planes.size(); ++index) {
    const std::size_t plane = part.first_plane + index;
    const PlaneEntry& entry = part.planes[index];
    const PlaneShape shape = block.shape(plane, part.segment_tokens);
    const ConstBytes stored = stored_bytes(part, entry);
    const WindowTarget target{window, targets[index - part.num_leading]};
    switch (entry.coding) {
      case Coding::kRaw:
        read_raw(shape, stored, target);
        break;
      case Coding::kSplit:
        read_split(shape, take_streams(streams, shape, plane, next_stream), target);
        break;
      case Coding::kExponent:
        pending.add(open_exponent_plane(plane, shape, entry, stored), target);
        break;
      case Coding::kQuantised:
        pending.add(open_quantised_plane(
                        plane, shape, entry,
                        calibration == nullptr ? nullptr : &calibration->plane(plane), stored),
                    target);
        break;
      case Coding::kBasis:
        break;
    }
  }
  KV_EXPECT(next_stream == streams.size(), ShapeError,
            std::to_string(streams.size()) + " streams; the planes of coding split take " +
                std::to_string(next_stream));
  pending.read();
  decode_groups(block, part, holders, calibration, window, targets);
  finish_lines();
}

}  // namespace kv
