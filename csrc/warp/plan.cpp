// SPDX-License-Identifier: Apache-2.0
// Plans a batch: parse and check first, then lay out. Until seal(), offsets in jobs count from the
// start of their own region.
#include "warp/plan.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/endian.hpp"
#include "elements/elements.hpp"
#include "warp/channels.hpp"

namespace kv::warp {
namespace {

constexpr std::size_t kAlignment = 16;
constexpr std::size_t kCopiedElements = 32768;

// A plane that has been checked.
struct OpenPlane {
  ConstBytes stored;
  ExponentSections exponent;
  QuantisedSections quantised;
};

OpenPlane open_plane(const DecodeRequest& request, std::size_t index) {
  const PlaneEntry& entry = request.part.planes[index];
  const std::size_t plane = request.part.first_plane + index;
  const PlaneShape shape = request.block.shape(plane, request.part.segment_tokens);
  OpenPlane open;
  open.stored = request.part.data.sub(entry.offset - request.part.data_offset, entry.nbytes);
  KV_EXPECT(entry.coding != Coding::kSplit, ConfigError,
            plane_name(plane) + " is compressed with zstd: decode this record on the host");
  if (entry.coding == Coding::kExponent) {
    open.exponent = find_exponent_sections(plane, shape, entry, open.stored);
  } else if (entry.coding == Coding::kQuantised) {
    KV_EXPECT(Transform::from(entry.transform).source != ParameterSource::kCalibration ||
                  request.calibration != nullptr,
              ShapeError, plane_name(plane) + " needs the calibration it was written with");
    open.quantised = find_quantised_sections(plane, shape, entry, open.stored);
  }
  return open;
}

void check_codings(const RecordPart& part) {
  for (std::size_t index = part.num_leading; index < part.planes.size(); ++index) {
    KV_EXPECT(part.planes[index].coding != Coding::kBasis, ConfigError,
              plane_name(part.first_plane + index) +
                  " is coded in a calibrated basis: decode this record on the host");
  }
  KV_EXPECT(part.num_leading == 0, ShapeError, "a record for warps has no leading planes");
}

std::vector<std::uint32_t> frozen_tables() {
  std::vector<std::uint32_t> words(class_tables().read.begin(),
                                   class_tables().read.begin() + kClassWords);
  for (int index = 0; index < 8; ++index) {
    words.push_back(bits_of(step_of(index)));
  }
  return words;
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

void DecodePlan::add(const DecodeRequest& request) {
  check_codings(request.part);
  check_places(request.block, request.part.planes.size(), request.targets, request.paging);
  check_calibration(request.block, request.calibration);
  static_cast<void>(open_planes(request.block, request.part));
  std::vector<OpenPlane> open;
  for (std::size_t index = 0; index < request.part.planes.size(); ++index) {
    open.push_back(open_plane(request, index));
  }
  // From here on nothing can be wrong with the record.
  const PlaneEntry& front = request.part.planes.front();
  const PlaneEntry& back = request.part.planes.back();
  const std::uint64_t nbytes = back.offset + back.padded_nbytes() - front.offset;
  payloads_.push_back(request.part.data.sub(front.offset - request.part.data_offset, nbytes));
  const std::uint64_t table = page_tables_.size() * sizeof(std::int32_t);
  if (request.paging.slots.empty()) {
    page_tables_.push_back(0);
  }
  page_tables_.insert(page_tables_.end(), request.paging.slots.begin(), request.paging.slots.end());
  for (std::size_t index = 0; index < open.size(); ++index) {
    const PlaneEntry& entry = request.part.planes[index];
    const std::size_t plane = request.part.first_plane + index;
    const PlaneShape shape = request.block.shape(plane, request.part.segment_tokens);
    const std::uint64_t stored = payload_nbytes_ + entry.offset - front.offset;
    const std::uint8_t* start = open[index].stored.data();
    PlaneJob job =
        place_rows(request.block, plane, entry.raw_rows, request.targets[index], request.paging);
    job.page_table = table;
    if (entry.coding == Coding::kExponent) {
      add_exponent(shape, plane, stored, start, open[index].exponent,
                   shape.grid(0, entry.segment_heads), job);
    } else if (entry.coding == Coding::kQuantised) {
      const bool is_calibrated =
          Transform::from(entry.transform).source == ParameterSource::kCalibration;
      add_quantised(shape, plane, stored, start, entry, open[index].quantised,
                    is_calibrated ? &request.calibration->plane(plane) : nullptr, job);
    } else {
      add_copies(plane, stored, shape.tokens, job);
    }
    planes_.push_back(job);
  }
  payload_nbytes_ += nbytes;
  ++num_requests_;
}

SegmentJob DecodePlan::segment_job(const Segment& segment) const {
  SegmentJob job{};
  job.plane = static_cast<std::uint32_t>(planes_.size());
  job.first_head = static_cast<std::uint16_t>(segment.first_head);
  job.num_heads = static_cast<std::uint16_t>(segment.num_heads);
  job.first_token = static_cast<std::uint16_t>(segment.first_token);
  job.num_tokens = static_cast<std::uint16_t>(segment.num_tokens);
  return job;
}

void DecodePlan::add_exponent(const PlaneShape& shape,
                              std::size_t plane,
                              std::uint64_t stored,
                              const std::uint8_t* start,
                              const ExponentSections& sections,
                              const SegmentGrid& grid,
                              PlaneJob& job) {
  job.has_choices = sections.tables.size() > 1;
  job.choices = stored + kSectionAlignment;
  job.lows = stored + static_cast<std::uint64_t>(sections.lows - start);
  job.read_pages = read_pages_.size() * sizeof(ReadEntry);
  const std::vector<ReadEntry> pages = read_pages(sections.tables);
  const std::size_t count = sections.tables.size() * kReadPage;  // without the null page
  read_pages_.insert(read_pages_.end(), pages.data(), pages.data() + count);
  job.tokens = static_cast<std::uint32_t>(shape.tokens);
  for (std::size_t index = 0; index < grid.size(); ++index) {
    const ConstBytes bytes = sections.segments[index];
    SegmentJob segment = segment_job(grid.at(index));
    segment.stored = stored + static_cast<std::uint64_t>(bytes.data() - start);
    segment.num_words = static_cast<std::uint32_t>((bytes.size() - kStatesNbytes) / 2);
    jobs_[static_cast<std::size_t>(JobKind::kExponent)].push_back(
        Named{segment, num_requests_, plane, index});
  }
}

void DecodePlan::add_quantised(const PlaneShape& shape,
                               std::size_t plane,
                               std::uint64_t stored,
                               const std::uint8_t* start,
                               const PlaneEntry& entry,
                               const QuantisedSections& sections,
                               const PlaneParameters* parameters,
                               PlaneJob& job) {
  const Transform transform = Transform::from(entry.transform);
  const auto offset_of = [&](const std::uint8_t* at) {
    return at == nullptr ? 0 : stored + static_cast<std::uint64_t>(at - start);
  };
  job.lows = offset_of(sections.lows);
  job.scale_bases = offset_of(sections.scale_bases);
  job.scales = offset_of(sections.scales);
  job.low_bits = entry.low_bits;
  job.scale_class = entry.scale_class;
  job.has_row_scales = transform.axis == StepAxis::kToken;
  job.has_mean = transform.has_mean;
  job.has_dpcm = transform.has_dpcm;
  job.channels =
      channels_of(shape, entry, transform.is_inline() ? &sections.inline_parameters : parameters);
  const SegmentGrid grid = shape.grid(entry.raw_rows, entry.segment_heads);
  for (std::size_t index = 0; index < grid.size(); ++index) {
    const StoredSegment& bytes = sections.segments[index];
    SegmentJob segment = segment_job(grid.at(index));
    segment.stored = offset_of(bytes.states.data());
    segment.num_words = static_cast<std::uint32_t>(bytes.words.size() / 2);
    segment.num_exceptions = static_cast<std::uint32_t>(bytes.num_exceptions);
    segment.rebuilt = scratch_nbytes_;
    if (transform.has_dpcm && segment.num_tokens > 1) {
      scratch_nbytes_ += segment.num_heads * grid.padded_dim() * sizeof(float);
    }
    jobs_[static_cast<std::size_t>(JobKind::kQuantised)].push_back(
        Named{segment, num_requests_, plane, index});
  }
  if (entry.raw_rows > 0) {
    add_copies(plane, offset_of(sections.raw), entry.raw_rows, job);
  }
}

void DecodePlan::add_copies(std::size_t plane,
                            std::uint64_t stored,
                            std::size_t rows,
                            const PlaneJob& job) {
  const std::size_t tokens = std::min(rows, std::max<std::size_t>(1, kCopiedElements / job.dim));
  const std::size_t heads = std::min<std::size_t>(
      job.heads, std::max<std::size_t>(1, kCopiedElements / job.dim / tokens));
  const SegmentGrid grid{job.heads, job.dim, rows, heads, tokens};
  for (std::size_t index = 0; index < grid.size(); ++index) {
    SegmentJob copy = segment_job(grid.at(index));
    copy.stored = stored;
    copy.num_words = static_cast<std::uint32_t>(rows);
    jobs_[static_cast<std::size_t>(JobKind::kCopy)].push_back(
        Named{copy, num_requests_, plane, index});
  }
}

std::uint64_t DecodePlan::channels_of(const PlaneShape& shape,
                                      const PlaneEntry& entry,
                                      const PlaneParameters* parameters) {
  const Transform transform = Transform::from(entry.transform);
  const ChannelKey key{parameters, entry.transform, entry.mult, entry.low_bits,
                       shape.heads * shape.dim};
  const bool is_shared = !transform.is_inline();
  const auto known = known_channels_.find(key);
  if (is_shared && known != known_channels_.end()) {
    return known->second;
  }
  const std::uint64_t at = channels_.size() * sizeof(ChannelJob);
  const std::vector<ChannelJob> jobs = channel_jobs(shape, entry, parameters);
  channels_.insert(channels_.end(), jobs.begin(), jobs.end());
  if (is_shared) {
    known_channels_.emplace(key, at);
  }
  return at;
}

void DecodePlan::seal() {
  std::uint32_t count = 0;
  for (std::uint32_t kind = 0; kind < kNumKinds; ++kind) {
    batch_.first[kind] = count;
    KV_EXPECT(jobs_[kind].size() < std::numeric_limits<std::uint32_t>::max() - count, ShapeError,
              "too many records for one batch");
    count += static_cast<std::uint32_t>(jobs_[kind].size());
  }
  batch_.first[kNumKinds] = count;
  batch_.statuses = 0;
  batch_.queues = std::uint64_t{count} * sizeof(Status);
  zeroed_nbytes_ = round_up(batch_.queues + kNumKinds * sizeof(std::uint32_t), kAlignment);

  const std::uint64_t channels = zeroed_nbytes_ + append(tables_, channels_);
  const std::uint64_t pages = zeroed_nbytes_ + append(tables_, read_pages_);
  const std::uint64_t page_tables = zeroed_nbytes_ + append(tables_, page_tables_);
  if (!jobs_[static_cast<std::size_t>(JobKind::kQuantised)].empty()) {
    batch_.frozen = zeroed_nbytes_ + append(tables_, frozen_tables());
  }
  const std::uint64_t planes_nbytes = round_up(planes_.size() * sizeof(PlaneJob), kAlignment);
  const std::uint64_t segments_nbytes =
      round_up(std::uint64_t{count} * sizeof(SegmentJob), kAlignment);
  batch_.planes = zeroed_nbytes_ + tables_.size();
  batch_.segments = batch_.planes + planes_nbytes;
  const std::uint64_t payload = batch_.segments + segments_nbytes;
  const std::uint64_t scratch = payload + payload_nbytes_;
  workspace_nbytes_ = scratch + scratch_nbytes_;

  for (PlaneJob& plane : planes_) {
    plane.page_table += page_tables;
    plane.lows += payload;
    plane.choices += payload;
    plane.scale_bases += payload;
    plane.scales += payload;
    plane.read_pages += pages;
    plane.channels += channels;
  }
  std::vector<SegmentJob> segments;
  segments.reserve(count);
  for (const std::vector<Named>& kind : jobs_) {
    for (const Named& named : kind) {
      segments.push_back(named.job);
      segments.back().stored += payload;
      segments.back().rebuilt += scratch;
    }
  }
  static_cast<void>(append(tables_, planes_));
  static_cast<void>(append(tables_, segments));
  uploads_.push_back(Upload{ConstBytes(tables_.data(), tables_.size()), zeroed_nbytes_});
  std::uint64_t at = payload;
  for (const ConstBytes bytes : payloads_) {
    uploads_.push_back(Upload{bytes, at});
    at += bytes.size();
  }
}

std::vector<std::string> DecodePlan::faults(ConstBytes zeroed) const {
  std::vector<std::string> found(num_requests_);
  const std::uint8_t* at = zeroed.sub(batch_.statuses, batch_.queues).data();
  for (const std::vector<Named>& kind : jobs_) {
    for (const Named& named : kind) {
      const auto status = static_cast<Status>(load_le<std::uint32_t>(at));
      at += sizeof(Status);
      if (status == Status::kNotRun) {
        throw IoError(located("segment " + std::to_string(named.index) + " of " +
                                  plane_name(named.plane) + " was not run",
                              __FILE__, __LINE__),
                      0);
      }
      if (status != Status::kDone && found[named.request].empty()) {
        found[named.request] = "segment " + std::to_string(named.index) + " of " +
                               plane_name(named.plane) +
                               (status == Status::kUneven ? " does not come out even"
                                                          : " has an exception out of place");
      }
    }
  }
  return found;
}

}  // namespace kv::warp
