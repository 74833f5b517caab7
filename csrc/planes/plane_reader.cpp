// SPDX-License-Identifier: Apache-2.0
// Finds segments that can be read in lock step, and reads them a few rows at a time, so that
// symbols are still in the cache when they become elements.
#include "planes/plane_reader.hpp"

#include <algorithm>
#include <map>
#include <utility>

namespace kv {
namespace {

constexpr std::size_t kTileSymbols = 4096;

struct SegmentJob {
  const PlaneJob* plane;
  std::size_t index;
  Segment segment;
};

bool overlaps(std::size_t first, std::size_t count, std::size_t other, std::size_t others) {
  return first < other + others && other < first + count;
}

// One place for each of the segments read together; kept from batch to batch.
struct Lane {
  RansReader reader;
  SegmentState state;
  std::vector<std::uint8_t> symbols;
};

void expect_finished(const SegmentJob& job, const RansReader& reader) {
  KV_EXPECT(reader.is_finished(), CorruptRecord,
            "segment " + std::to_string(job.index) + " of " +
                plane_name(job.plane->reader->plane()) + " does not come out even");
}

void read_batch(const SegmentJob* jobs, std::size_t num_jobs, std::vector<Lane>& lanes) {
  const Segment& segment = jobs[0].segment;
  const std::size_t groups = segment.num_heads * jobs[0].plane->reader->grid().head_groups();
  const std::size_t tile = std::max(std::size_t{1}, kTileSymbols / (groups * kGroup));
  std::array<ReadJob, kMaxReaders> reads{};
  for (std::size_t lane = 0; lane < num_jobs; ++lane) {
    const PlaneReader& plane = *jobs[lane].plane->reader;
    plane.begin(jobs[lane].index, lanes[lane].reader, lanes[lane].state);
    lanes[lane].symbols.resize(std::max(lanes[lane].symbols.size(), tile * groups * kGroup));
    reads[lane] = ReadJob{&lanes[lane].reader, plane.table(), plane.bases(jobs[lane].segment, true),
                          lanes[lane].symbols.data()};
  }
  for (std::size_t row = 0; row < segment.num_tokens;) {
    // The first row may have other classes than the rest.
    const std::size_t rows = row == 0 ? 1 : std::min(tile, segment.num_tokens - row);
    read_groups(reads.data(), num_jobs, rows, groups);
    for (std::size_t lane = 0; lane < num_jobs; ++lane) {
      const PlaneReader& plane = *jobs[lane].plane->reader;
      plane.write_rows(jobs[lane].segment, row, rows, reads[lane].symbols, lanes[lane].state,
                       jobs[lane].plane->target);
      if (row == 0) {
        reads[lane].bases = plane.bases(jobs[lane].segment, false);
      }
    }
    row += rows;
  }
  for (std::size_t lane = 0; lane < num_jobs; ++lane) {
    expect_finished(jobs[lane], lanes[lane].reader);
    jobs[lane].plane->reader->end(jobs[lane].index, jobs[lane].plane->target);
  }
}

}  // namespace

void read_planes(const std::vector<PlaneJob>& jobs) {
  // Rows, and groups of a row, of the segments that go together.
  std::map<std::pair<std::size_t, std::size_t>, std::vector<SegmentJob>> shapes;
  for (const PlaneJob& job : jobs) {
    job.reader->write_raw_rows(job.target);
    const SegmentGrid& grid = job.reader->grid();
    const Window& window = job.target.window;
    for (std::size_t index = 0; index < grid.size(); ++index) {
      const Segment segment = grid.at(index);
      if (overlaps(segment.first_head, segment.num_heads, window.first_head, window.num_heads) &&
          overlaps(job.reader->raw_rows() + segment.first_token, segment.num_tokens,
                   window.first_token, window.num_tokens)) {
        shapes[{segment.num_tokens, segment.num_heads * grid.head_groups()}].push_back(
            SegmentJob{&job, index, segment});
      }
    }
  }
  std::vector<Lane> lanes(kMaxReaders);
  for (const auto& [shape, segments] : shapes) {
    for (std::size_t at = 0; at < segments.size(); at += kMaxReaders) {
      read_batch(segments.data() + at, std::min(kMaxReaders, segments.size() - at), lanes);
    }
  }
}

}  // namespace kv
