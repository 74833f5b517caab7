// SPDX-License-Identifier: Apache-2.0
// The writer of records: every plane in the coding that its profile prefers, if that makes it
// smaller.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "codec/groups.hpp"
#include "codec/record.hpp"
#include "core/crc32c.hpp"
#include "core/endian.hpp"
#include "elements/byte_split.hpp"
#include "planes/exponent_plane.hpp"
#include "planes/quantised_plane.hpp"

namespace kv {
namespace {

constexpr std::size_t kLengthNbytes = 4;
// Without a calibration, fewer tokens than this do not pay for parameters of their own.
constexpr std::size_t kFewestMeasured = 16;
// Steps in a basis are far coarser than a plane alone bears: without one it gets those of q2.
constexpr int kLeastKeyMult = 1;
constexpr int kLeastValueMult = -1;

// Hands out the streams of the split planes in order.
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

void write_raw_plane(const PlaneShape& shape, const SourceRows& source, SectionWriter& writer) {
  const bool is_dense = source.token_stride == static_cast<std::ptrdiff_t>(shape.row_nbytes());
  const std::size_t run = is_dense ? shape.tokens : 1;
  for (std::size_t head = 0; head < shape.heads; ++head) {
    for (std::size_t token = 0; token < shape.tokens; token += run) {
      writer.append(source.row(head, token), run * shape.row_nbytes());
    }
  }
}

// Returns 0 when the plane does not shrink.
std::size_t write_split_plane(const PlaneShape& shape,
                              std::size_t plane,
                              const ConstBytes* streams,
                              Bytes room) {
  SectionWriter writer(room);
  for (std::size_t stream = 0; stream < shape.itemsize(); ++stream) {
    KV_EXPECT(streams[stream].size() > 0 && streams[stream].size() <= shape.elements(), ShapeError,
              "a stream of " + std::to_string(streams[stream].size()) + " bytes for " +
                  plane_name(plane) + ", which has " + std::to_string(shape.elements()) +
                  " elements");
    const auto nbytes = static_cast<std::uint32_t>(streams[stream].size());
    writer.append(&nbytes, kLengthNbytes);
  }
  for (std::size_t stream = 0; stream < shape.itemsize(); ++stream) {
    writer.append(streams[stream].data(), streams[stream].size());
  }
  return writer.is_full() ? 0 : writer.nbytes();
}

class RecordWriter {
 public:
  RecordWriter(const BlockView& block,
               const WriterSettings& settings,
               std::uint64_t first_token,
               ConstBytes slot,
               Bytes out)
      : block_(block), settings_(settings), slot_(slot), out_(out), cursor_(settings.streams) {
    const Geometry& geometry = block.geometry;
    info_.dtype = block.dtype;
    info_.profile = settings.profile;
    info_.num_layers = geometry.num_layers();
    info_.kv_heads = geometry.kv_heads();
    info_.key_dim = geometry.key_dim();
    info_.value_dim = geometry.value_dim();
    info_.num_tokens = block.num_tokens;
    info_.segment_tokens =
        chosen_segment_tokens(block.num_tokens, std::max(geometry.key_dim(), geometry.value_dim()));
    info_.first_token = first_token;
    info_.planes.resize(geometry.num_planes());
    raw_rows_ = first_token == 0 ? std::min(kMaxRawRows, block.num_tokens - 1) : 0;
  }

  std::size_t write() {
    std::uint64_t offset = info_.header_nbytes();
    KV_EXPECT(offset <= out_.size(), ShapeError,
              "no room for a header of " + std::to_string(offset) + " bytes in " +
                  std::to_string(out_.size()));
    for (std::size_t plane = 0; plane < info_.planes.size(); ++plane) {
      PlaneEntry& entry = info_.planes[plane];
      write_plane(plane, offset, entry);
      entry.offset = offset;
      const Bytes stored = out_.sub(offset, entry.padded_nbytes());
      std::memset(stored.data() + entry.nbytes, 0, stored.size() - entry.nbytes);
      entry.crc32c = crc32c(ConstBytes(stored.data(), stored.size()));
      offset += stored.size();
    }
    cursor_.expect_end();
    if (std::any_of(info_.planes.begin(), info_.planes.end(), &is_calibrated)) {
      info_.calibration = settings_.calibration->id();
    }
    info_.total_nbytes = offset;
    write_header(info_, out_);
    return static_cast<std::size_t>(offset);
  }

 private:
  [[nodiscard]] bool is_lossy() const noexcept { return settings_.profile >= Profile::kQ8; }

  [[nodiscard]] bool has_bases() const noexcept {
    return settings_.profile == Profile::kPca && settings_.calibration != nullptr &&
           settings_.calibration->bases().group_layers > 0;
  }

  // Writes the group that begins with a plane, if there is one and it shrinks.
  bool write_group(std::size_t plane, std::uint64_t offset, PlaneEntry& entry) {
    if (!has_bases() || (settings_.has_exact_keys && plane % 2 == 0)) {
      return false;
    }
    const Bases& bases = settings_.calibration->bases();
    if (plane / 2 % bases.group_layers != 0 || bases.of_plane(plane).rank == 0) {
      return false;
    }
    const GroupShape shape = group_shape(*settings_.calibration, plane, info_.shape(plane));
    std::vector<SourceRows> sources;
    for (std::size_t layer = 0; layer < shape.basis->layers; ++layer) {
      sources.push_back(block_.rows(slot_.data(), plane + 2 * layer));
    }
    const std::uint64_t raw_nbytes = sources.size() * info_.shape(plane).raw_nbytes();
    const Bytes room =
        out_.sub(offset, std::min<std::uint64_t>({raw_nbytes - 1, out_.size() - offset,
                                                  std::numeric_limits<std::uint32_t>::max()}));
    const int mult = plane % 2 == 0 ? settings_.key_mult : settings_.value_mult;
    entry.nbytes = write_basis_group(shape, mult, raw_rows_, sources, entry, room);
    if (entry.nbytes == 0) {
      entry = PlaneEntry{};
      return false;
    }
    for (std::size_t layer = 1; layer < sources.size(); ++layer) {
      info_.planes[plane + 2 * layer].coding = Coding::kBasis;
    }
    return true;
  }

  void write_plane(std::size_t plane, std::uint64_t offset, PlaneEntry& entry) {
    const PlaneShape shape = info_.shape(plane);
    const SourceRows source = block_.rows(slot_.data(), plane);
    const std::uint64_t raw_nbytes = shape.raw_nbytes();
    if (entry.coding == Coding::kBasis || write_group(plane, offset, entry)) {
      entry.raw_nbytes = raw_nbytes;
      return;
    }
    // A coding other than raw has to save a byte at least.
    const Bytes room =
        out_.sub(offset, std::min<std::uint64_t>(raw_nbytes - 1, out_.size() - offset));
    if (is_lossy() && !(settings_.has_exact_keys && plane % 2 == 0)) {
      entry.nbytes = write_lossy(plane, shape, source, entry, room);
    }
    if (settings_.profile >= Profile::kLossless && entry.nbytes == 0) {
      entry = PlaneEntry{};
      entry.nbytes = write_exponent_plane(shape, plane % 2 == 0, source, entry, room);
    }
    if (settings_.profile == Profile::kZstd && settings_.is_split[plane]) {
      entry.coding = Coding::kSplit;
      entry.nbytes = write_split_plane(shape, plane, cursor_.take(shape.itemsize()), room);
      KV_EXPECT(entry.nbytes > 0, ShapeError,
                plane_name(plane) + " does not shrink or has no room: it must be stored raw");
    }
    if (entry.nbytes == 0) {
      entry = PlaneEntry{};
      SectionWriter writer(out_.sub(offset, raw_nbytes));
      write_raw_plane(shape, source, writer);
      entry.nbytes = writer.nbytes();
    }
    entry.raw_nbytes = raw_nbytes;
  }

  std::size_t write_lossy(std::size_t plane,
                          const PlaneShape& shape,
                          const SourceRows& source,
                          PlaneEntry& entry,
                          Bytes room) const {
    const bool is_key = plane % 2 == 0;
    const bool has_calibration = settings_.calibration != nullptr;
    QuantisedChoice choice{};
    choice.mult = is_key ? settings_.key_mult : settings_.value_mult;
    if (has_bases()) {
      choice.mult = std::max(choice.mult, is_key ? kLeastKeyMult : kLeastValueMult);
    }
    choice.raw_rows = raw_rows_;
    choice.parameters = has_calibration ? &settings_.calibration->plane(plane) : nullptr;
    const bool has_mean = is_key || settings_.has_channel_values;
    choice.transform.has_mean = has_mean;
    choice.transform.has_dpcm = is_key && has_calibration;
    choice.transform.axis = is_key     ? StepAxis::kHead
                            : has_mean ? StepAxis::kChannel
                                       : StepAxis::kToken;
    choice.transform.source = has_calibration ? ParameterSource::kCalibration
                              : is_key        ? ParameterSource::kInlineWeighted
                              : has_mean      ? ParameterSource::kInline
                                              : ParameterSource::kNone;
    if (choice.transform.is_inline() && shape.tokens - raw_rows_ < kFewestMeasured) {
      return 0;
    }
    return write_quantised_plane(shape, choice, source, entry, room);
  }

  const BlockView& block_;
  const WriterSettings& settings_;
  ConstBytes slot_;
  Bytes out_;
  StreamCursor cursor_;
  RecordInfo info_;
  std::size_t raw_rows_ = 0;
};

void check_mult(int mult) {
  KV_EXPECT(mult >= -128 && mult <= 127, ShapeError,
            "a step of 2^(-" + std::to_string(mult) + "/8): the number must be -128 to 127");
}

}  // namespace

std::size_t record_bound(const BlockView& block) noexcept {
  std::size_t layer_nbytes = 2 * kEntryNbytes;
  for (const std::size_t plane : {std::size_t{0}, std::size_t{1}}) {
    layer_nbytes += static_cast<std::size_t>(
        round_up(block.elements(plane) * block.geometry.itemsize(), kPlaneAlignment));
  }
  return kHeaderNbytes + block.geometry.num_layers() * layer_nbytes;
}

void split_planes(const BlockView& block, ConstBytes slot, Bytes streams) {
  check_slot(block, slot.size());
  const std::size_t itemsize = block.geometry.itemsize();
  std::uint64_t offset = 0;
  for (std::size_t plane = 0; plane < block.geometry.num_planes(); ++plane) {
    const std::size_t elements = block.elements(plane);
    const Bytes room = streams.sub(offset, elements * itemsize);
    offset += room.size();
    const SourceRows source = block.rows(slot.data(), plane);
    const std::size_t run = block.num_tokens * block.geometry.dim(plane);
    for (std::size_t head = 0; head < block.geometry.kv_heads(); ++head) {
      Streams at{};
      for (std::size_t stream = 0; stream < itemsize; ++stream) {
        at[stream] = room.data() + stream * elements + head * run;
      }
      split_bytes(source.row(head, 0), run, itemsize, at);
    }
  }
}

std::size_t encode_record(const BlockView& block,
                          const WriterSettings& settings,
                          std::uint64_t first_token,
                          ConstBytes slot,
                          Bytes out) {
  check_slot(block, slot.size());
  check_calibration(block, settings.calibration);
  check_mult(settings.key_mult);
  check_mult(settings.value_mult);
  KV_EXPECT(
      settings.profile != Profile::kZstd || settings.is_split.size() == block.geometry.num_planes(),
      ShapeError,
      std::to_string(settings.is_split.size()) + " choices for " +
          std::to_string(block.geometry.num_planes()) + " planes");
  return RecordWriter(block, settings, first_token, slot, out).write();
}

}  // namespace kv
