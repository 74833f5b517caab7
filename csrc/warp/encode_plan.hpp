// SPDX-License-Identifier: Apache-2.0
// Blocks to jobs for warps that encode them, and what the warps made to records.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "codec/record.hpp"
#include "warp/encode_jobs.hpp"
#include "warp/places.hpp"
#include "warp/plan.hpp"

namespace kv::warp {

/// One block, and where the rows of all its planes lie.
struct EncodeRequest {
  BlockView block;
  WriterSettings settings;  ///< lossy, calibrated, keys too
  std::uint64_t first_token;
  std::vector<PlaneTarget> sources;  ///< one per plane
  Paging paging;
};

/// A batch of blocks. Add, seal, run, then assemble; not thread-safe.
class EncodePlan {
 public:
  /// Plans the segments of all planes. The calibration must outlive the plan.
  /// @throws ShapeError for sources that do not fit, ConfigError for settings that only the host
  /// encodes: bit-exact profiles, exact keys, no calibration.
  void add(const EncodeRequest& request);

  /// Lays the workspace out; to be called once, after the last block.
  void seal();

  [[nodiscard]] const EncodeBatch& batch() const noexcept { return batch_; }
  /// The workspace begins with as many bytes that tell what came out...
  [[nodiscard]] std::uint64_t results_nbytes() const noexcept { return results_nbytes_; }
  /// ... and with as many that must be zero before the run.
  [[nodiscard]] std::uint64_t zeroed_nbytes() const noexcept { return zeroed_nbytes_; }
  [[nodiscard]] std::uint64_t workspace_nbytes() const noexcept { return workspace_nbytes_; }
  /// What the workspace must hold before the run.
  [[nodiscard]] Upload tables() const noexcept {
    return Upload{ConstBytes(tables_.data(), tables_.size()), zeroed_nbytes_};
  }

  struct Piece {
    std::uint64_t offset;  ///< in the workspace
    std::uint64_t nbytes;
  };
  /// Where the planes of each block are, in the order of adding; none for a block of which a plane
  /// does not shrink: that one is the host's to encode.
  /// @param results  the start of the workspace after the run. @throws IoError when a job was not
  /// run.
  [[nodiscard]] std::vector<std::vector<Piece>> pieces(ConstBytes results) const;

  /// A block's record. @param planes  its pieces. @throws ShapeError when they are not.
  [[nodiscard]] std::vector<std::uint8_t> assemble(std::size_t request,
                                                   ConstBytes results,
                                                   const std::vector<ConstBytes>& planes) const;

 private:
  struct Planned {
    RecordInfo info;  ///< without what the run tells
    std::size_t first_plane;
  };
  using ChannelKey = std::tuple<const PlaneParameters*, std::uint8_t, int, std::size_t>;

  void add_plane(const EncodeRequest& request, RecordInfo& info, std::size_t plane);
  void add_segments(const SegmentGrid& grid, std::size_t itemsize, EncodePlaneJob& job);
  [[nodiscard]] std::uint64_t scratch(std::uint64_t nbytes);
  [[nodiscard]] EncodedPlane made(ConstBytes results, std::size_t plane) const;

  std::vector<Planned> requests_;
  std::vector<EncodePlaneJob> planes_;
  std::vector<EncodeSegmentJob> segments_;
  std::vector<ChannelJob> channels_;
  std::map<ChannelKey, std::uint64_t> known_channels_;
  std::vector<std::int32_t> page_tables_;
  std::uint64_t rooms_nbytes_ = 0;
  std::uint64_t scratch_nbytes_ = 0;

  EncodeBatch batch_{};
  std::uint64_t results_nbytes_ = 0;
  std::uint64_t zeroed_nbytes_ = 0;
  std::uint64_t workspace_nbytes_ = 0;
  std::vector<std::uint8_t> tables_;
};

}  // namespace kv::warp
