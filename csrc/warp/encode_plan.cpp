// SPDX-License-Identifier: Apache-2.0
// Plans a batch: sizes follow from geometry and settings alone. Until seal(), offsets in jobs count
// from the start of their own region.
#include "warp/encode_plan.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/crc32c.hpp"
#include "core/endian.hpp"
#include "elements/elements.hpp"
#include "warp/channels.hpp"

namespace kv::warp {
namespace {

#include "entropy/class_tables.inc"

constexpr std::size_t kAlignment = 16;

std::vector<std::uint32_t> frozen_tables() {
  const auto& write = class_tables().write;
  std::vector<std::uint32_t> words(write.begin(), write.begin() + kExp2At);
  words.insert(words.end(), std::begin(kExp2Bits), std::end(kExp2Bits));
  words.insert(words.end(), std::begin(kLog16), std::end(kLog16));
  words.insert(words.end(), std::begin(kRadius), std::end(kRadius));
  return words;
}

// Section 9, calibrated.
Transform transform_of(const WriterSettings& settings, bool is_key) {
  const bool has_mean = is_key || settings.has_channel_values;
  return Transform{is_key     ? StepAxis::kHead
                   : has_mean ? StepAxis::kChannel
                              : StepAxis::kToken,
                   has_mean, is_key, ParameterSource::kCalibration};
}

// Appends a table behind the others; returns where it begins.
template <typename Item>
std::uint64_t append(std::vector<std::uint8_t>& tables, const std::vector<Item>& items) {
  const std::size_t at = tables.size();
  const std::size_t nbytes = items.size() * sizeof(Item);
  tables.resize(round_up(at + nbytes, kAlignment));
  if (nbytes > 0) {
    std::memcpy(tables.data() + at, items.data(), nbytes);
  }
  return at;
}

}  // namespace

void EncodePlan::add(const EncodeRequest& request) {
  const WriterSettings& settings = request.settings;
  const Geometry& geometry = request.block.geometry;
  KV_EXPECT(settings.profile >= Profile::kQ8 && settings.calibration != nullptr &&
                !settings.has_exact_keys,
            ConfigError, "only lossy keys and values with a calibration are encoded on a device");
  KV_EXPECT(
      settings.profile != Profile::kPca || settings.calibration->bases().group_layers == 0,
      ConfigError,
      "profile pca with a calibration that has bases is encoded on the host, not on a device");
  check_calibration(request.block, settings.calibration);
  check_places(request.block, geometry.num_planes(), request.sources, request.paging);
  for (const int mult : {settings.key_mult, settings.value_mult}) {
    KV_EXPECT(mult >= -128 && mult <= 127, ShapeError,
              "a step of 2^(-" + std::to_string(mult) + "/8): the number must be -128 to 127");
  }
  RecordInfo info;
  info.dtype = request.block.dtype;
  info.profile = settings.profile;
  info.num_layers = geometry.num_layers();
  info.kv_heads = geometry.kv_heads();
  info.key_dim = geometry.key_dim();
  info.value_dim = geometry.value_dim();
  info.num_tokens = request.block.num_tokens;
  info.segment_tokens =
      chosen_segment_tokens(info.num_tokens, std::max(info.key_dim, info.value_dim));
  info.first_token = request.first_token;
  info.calibration = settings.calibration->id();
  info.planes.resize(geometry.num_planes());
  const std::size_t first_plane = planes_.size();
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    add_plane(request, info, plane);
  }
  if (request.paging.slots.empty()) {
    page_tables_.push_back(0);
  }
  page_tables_.insert(page_tables_.end(), request.paging.slots.begin(), request.paging.slots.end());
  requests_.push_back(Planned{std::move(info), first_plane});
}

void EncodePlan::add_plane(const EncodeRequest& request, RecordInfo& info, std::size_t plane) {
  const bool is_key = plane % 2 == 0;
  const PlaneShape shape = info.shape(plane);
  const Transform transform = transform_of(request.settings, is_key);
  const std::size_t raw_rows =
      request.first_token == 0 ? std::min(kMaxRawRows, info.num_tokens - 1) : 0;
  PlaneEntry& entry = info.planes[plane];
  entry.coding = Coding::kQuantised;
  entry.transform = transform.byte();
  entry.mult =
      static_cast<std::int8_t>(is_key ? request.settings.key_mult : request.settings.value_mult);
  entry.low_bits = static_cast<std::uint8_t>(
      std::min(std::max((entry.mult - 16) >> 3, 0), static_cast<int>(kMaxLowBits)));
  entry.raw_rows = static_cast<std::uint8_t>(raw_rows);
  entry.raw_nbytes = shape.raw_nbytes();
  const std::size_t tokens = info.num_tokens - raw_rows;
  entry.segment_heads = static_cast<std::uint16_t>(
      chosen_segment_heads(shape.heads, shape.dim, tokens, shape.segment_tokens));
  const SegmentGrid grid = shape.grid(raw_rows, entry.segment_heads);

  EncodePlaneJob job{};
  job.rows = place_rows(request.block, plane, raw_rows, request.sources[plane], request.paging);
  job.rows.page_table = page_tables_.size() * sizeof(std::int32_t);
  job.rows.low_bits = entry.low_bits;
  job.rows.has_row_scales = transform.axis == StepAxis::kToken;
  job.rows.has_mean = transform.has_mean;
  job.rows.has_dpcm = transform.has_dpcm;
  const PlaneParameters& parameters = request.settings.calibration->plane(plane);
  const ChannelKey key{&parameters, entry.transform, entry.mult, shape.heads * shape.dim};
  const auto [known, is_new] = known_channels_.emplace(key, channels_.size() * sizeof(ChannelJob));
  if (is_new) {
    const std::vector<ChannelJob> jobs = channel_jobs(shape, entry, &parameters);
    channels_.insert(channels_.end(), jobs.begin(), jobs.end());
  }
  job.rows.channels = known->second;
  job.raw_nbytes = entry.raw_nbytes;
  job.mult = entry.mult;
  job.inverse_dim = 1.0F / static_cast<float>(shape.dim);
  const std::uint64_t rows = std::uint64_t{shape.heads} * tokens;
  if (transform.axis == StepAxis::kToken) {
    job.rows.scales = scratch(rows * sizeof(std::int16_t));
    job.wanted = scratch(rows * sizeof(std::int32_t));
    job.spreads = scratch(kLanes * 2 * sizeof(std::uint64_t));
  }
  add_segments(grid, shape.itemsize(), job);
  // All sections but the segments are written whether the plane shrinks or not.
  const std::uint64_t fixed = 2 * shape.heads + rows + 8 * grid.size() +
                              std::uint64_t{shape.heads} * raw_rows * shape.row_nbytes() +
                              rows * entry.low_bits * ((shape.dim + 7) / 8) + 4 * kAlignment;
  job.room = rooms_nbytes_;
  rooms_nbytes_ += round_up(std::max(entry.raw_nbytes, fixed), kAlignment);
  planes_.push_back(job);
}

void EncodePlan::add_segments(const SegmentGrid& grid, std::size_t itemsize, EncodePlaneJob& job) {
  KV_EXPECT(grid.size() < std::numeric_limits<std::uint32_t>::max() - segments_.size(), ShapeError,
            "too many blocks for one batch");
  job.first_segment = static_cast<std::uint32_t>(segments_.size());
  job.num_segments = static_cast<std::uint32_t>(grid.size());
  for (std::size_t index = 0; index < grid.size(); ++index) {
    const Segment segment = grid.at(index);
    const std::uint64_t rows = segment.num_heads * segment.num_tokens;
    const std::uint64_t symbols = rows * grid.padded_dim();
    const std::uint64_t words = symbols + round_up(rows, kGroup);
    EncodeSegmentJob made{};
    made.symbols = scratch(symbols);
    made.flags = scratch(rows * grid.head_groups() * 2 * sizeof(std::uint32_t));
    made.states = scratch(kStatesNbytes);
    made.words = scratch(words * sizeof(std::uint16_t));
    made.indices = scratch(rows * grid.dim * sizeof(std::uint16_t));
    made.bits = scratch(rows * grid.dim * itemsize);
    made.plane = static_cast<std::uint32_t>(planes_.size());
    made.most_words = static_cast<std::uint32_t>(words);
    made.first_head = static_cast<std::uint16_t>(segment.first_head);
    made.num_heads = static_cast<std::uint16_t>(segment.num_heads);
    made.first_token = static_cast<std::uint16_t>(segment.first_token);
    made.num_tokens = static_cast<std::uint16_t>(segment.num_tokens);
    segments_.push_back(made);
  }
}

std::uint64_t EncodePlan::scratch(std::uint64_t nbytes) {
  const std::uint64_t at = scratch_nbytes_;
  scratch_nbytes_ += round_up(nbytes, kAlignment);
  return at;
}

void EncodePlan::seal() {
  batch_.num_planes = static_cast<std::uint32_t>(planes_.size());
  batch_.num_segments = static_cast<std::uint32_t>(segments_.size());
  batch_.made_planes = 0;
  results_nbytes_ = round_up(planes_.size() * sizeof(EncodedPlane), kAlignment);
  const std::uint64_t rooms = results_nbytes_;
  zeroed_nbytes_ = rooms + rooms_nbytes_;
  const std::uint64_t channels = zeroed_nbytes_ + append(tables_, channels_);
  const std::uint64_t page_tables = zeroed_nbytes_ + append(tables_, page_tables_);
  batch_.frozen = zeroed_nbytes_ + append(tables_, frozen_tables());
  batch_.planes = zeroed_nbytes_ + tables_.size();
  batch_.segments = batch_.planes + round_up(planes_.size() * sizeof(EncodePlaneJob), kAlignment);
  batch_.made_segments =
      batch_.segments + round_up(segments_.size() * sizeof(EncodeSegmentJob), kAlignment);
  const std::uint64_t scratch_at =
      batch_.made_segments + round_up(segments_.size() * sizeof(EncodedSegment), kAlignment);
  workspace_nbytes_ = scratch_at + scratch_nbytes_;
  for (EncodePlaneJob& plane : planes_) {
    plane.room += rooms;
    plane.wanted += scratch_at;
    plane.spreads += scratch_at;
    plane.rows.scales += scratch_at;
    plane.rows.channels += channels;
    plane.rows.page_table += page_tables;
  }
  for (EncodeSegmentJob& segment : segments_) {
    for (std::uint64_t* at : {&segment.symbols, &segment.flags, &segment.states, &segment.words,
                              &segment.indices, &segment.bits}) {
      *at += scratch_at;
    }
  }
  static_cast<void>(append(tables_, planes_));
  static_cast<void>(append(tables_, segments_));
}

EncodedPlane EncodePlan::made(ConstBytes results, std::size_t plane) const {
  EncodedPlane found;
  std::memcpy(&found, results.sub(plane * sizeof(found), sizeof(found)).data(), sizeof(found));
  if (found.is_done == 0) {
    throw IoError(located("plane " + std::to_string(plane) + " of the batch was not encoded",
                          __FILE__, __LINE__),
                  0);
  }
  return found;
}

std::vector<std::vector<EncodePlan::Piece>> EncodePlan::pieces(ConstBytes results) const {
  std::vector<std::vector<Piece>> all;
  for (const Planned& request : requests_) {
    std::vector<Piece> found;
    for (std::size_t plane = 0; plane < request.info.planes.size(); ++plane) {
      const std::size_t index = request.first_plane + plane;
      found.push_back(Piece{planes_[index].room, made(results, index).nbytes});
    }
    const bool shrinks = std::all_of(found.begin(), found.end(),
                                     [](const Piece& piece) { return piece.nbytes > 0; });
    all.push_back(shrinks ? found : std::vector<Piece>{});
  }
  return all;
}

std::vector<std::uint8_t> EncodePlan::assemble(std::size_t request,
                                               ConstBytes results,
                                               const std::vector<ConstBytes>& planes) const {
  KV_EXPECT(request < requests_.size() && planes.size() == requests_[request].info.planes.size(),
            ShapeError, "a record is assembled from the pieces of its planes");
  RecordInfo info = requests_[request].info;
  std::vector<std::uint8_t> record(info.header_nbytes());
  for (std::size_t plane = 0; plane < planes.size(); ++plane) {
    const EncodedPlane found = made(results, requests_[request].first_plane + plane);
    PlaneEntry& entry = info.planes[plane];
    KV_EXPECT(found.nbytes > 0 && planes[plane].size() == found.nbytes, ShapeError,
              "a piece of " + std::to_string(planes[plane].size()) + " bytes for " +
                  plane_name(plane) + ", which has " + std::to_string(found.nbytes));
    entry.offset = record.size();
    entry.nbytes = found.nbytes;
    entry.scale_class = static_cast<std::uint8_t>(found.scale_class);
    record.insert(record.end(), planes[plane].data(), planes[plane].data() + found.nbytes);
    record.resize(entry.offset + entry.padded_nbytes());
    entry.crc32c = crc32c(ConstBytes(record.data() + entry.offset, entry.padded_nbytes()));
  }
  info.total_nbytes = record.size();
  write_header(info, Bytes(record.data(), record.size()));
  return record;
}

}  // namespace kv::warp
