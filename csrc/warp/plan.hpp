// SPDX-License-Identifier: Apache-2.0
// Records to jobs for warps: everything that can be checked is checked here, on the host, so that a
// job's addresses hold whatever its words are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "codec/record.hpp"
#include "core/span.hpp"
#include "planes/sections.hpp"
#include "warp/jobs.hpp"
#include "warp/places.hpp"

namespace kv::warp {

/// Consecutive planes of one record, and where all of their tokens go.
struct DecodeRequest {
  BlockView block;
  RecordPart part;
  const Calibration* calibration;    ///< null when the record needs none
  std::vector<PlaneTarget> targets;  ///< one per plane
  Paging paging;
};

/// Bytes to be brought to an offset of the workspace.
struct Upload {
  ConstBytes host;
  std::uint64_t offset;
};

/// A batch of records. Add, seal, then run; not thread-safe.
class DecodePlan {
 public:
  /// Verifies the checksums of the planes and where their sections lie, and plans their segments.
  ///
  /// The record's bytes must outlive the run, the calibration the plan. When this throws, the plan
  /// is as it was before.
  /// @throws CorruptRecord that names the plane, ShapeError for a target that does not fit,
  /// ConfigError for planes of codings split and basis, which only the host can decode.
  void add(const DecodeRequest& request);

  /// Lays the workspace out; to be called once, after the last record.
  void seal();

  [[nodiscard]] std::size_t num_requests() const noexcept { return num_requests_; }
  [[nodiscard]] const Batch& batch() const noexcept { return batch_; }
  /// The workspace begins with as many bytes that must be zero before the run.
  [[nodiscard]] std::uint64_t zeroed_nbytes() const noexcept { return zeroed_nbytes_; }
  [[nodiscard]] std::uint64_t workspace_nbytes() const noexcept { return workspace_nbytes_; }
  /// What the workspace must hold before the run.
  [[nodiscard]] const std::vector<Upload>& uploads() const noexcept { return uploads_; }

  /// What is wrong with each request, in the order of adding: empty where nothing is.
  /// @param zeroed  the start of the workspace after the run.
  /// @throws IoError when a job was not run.
  [[nodiscard]] std::vector<std::string> faults(ConstBytes zeroed) const;

 private:
  struct Named {
    SegmentJob job;
    std::size_t request;
    std::size_t plane;
    std::size_t index;
  };
  using ChannelKey = std::tuple<const PlaneParameters*, std::uint8_t, int, unsigned, std::size_t>;

  void add_exponent(const PlaneShape& shape,
                    std::size_t plane,
                    std::uint64_t stored,
                    const std::uint8_t* start,
                    const ExponentSections& sections,
                    const SegmentGrid& grid,
                    PlaneJob& job);
  void add_quantised(const PlaneShape& shape,
                     std::size_t plane,
                     std::uint64_t stored,
                     const std::uint8_t* start,
                     const PlaneEntry& entry,
                     const QuantisedSections& sections,
                     const PlaneParameters* parameters,
                     PlaneJob& job);
  void add_copies(std::size_t plane, std::uint64_t stored, std::size_t rows, const PlaneJob& job);
  [[nodiscard]] std::uint64_t channels_of(const PlaneShape& shape,
                                          const PlaneEntry& entry,
                                          const PlaneParameters* parameters);
  [[nodiscard]] SegmentJob segment_job(const Segment& segment) const;

  std::vector<PlaneJob> planes_;
  std::vector<Named> jobs_[kNumKinds];
  std::vector<ChannelJob> channels_;
  std::map<ChannelKey, std::uint64_t> known_channels_;
  std::vector<ReadEntry> read_pages_;
  std::vector<std::int32_t> page_tables_;
  std::vector<ConstBytes> payloads_;
  std::uint64_t payload_nbytes_ = 0;
  std::uint64_t scratch_nbytes_ = 0;
  std::size_t num_requests_ = 0;

  Batch batch_{};
  std::uint64_t zeroed_nbytes_ = 0;
  std::uint64_t workspace_nbytes_ = 0;
  std::vector<std::uint8_t> tables_;
  std::vector<Upload> uploads_;
};

}  // namespace kv::warp
