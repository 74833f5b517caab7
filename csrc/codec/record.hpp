// SPDX-License-Identifier: Apache-2.0
// Slots <-> records. The zstd step of coding split lies outside: callers compress and decompress
// the streams in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/calibration.hpp"
#include "codec/container.hpp"
#include "core/geometry.hpp"
#include "core/span.hpp"

namespace kv {

/// Which tokens of a slot are meant, and how their elements read.
struct BlockView {
  Geometry geometry;
  DType dtype;
  std::size_t num_tokens;

  /// @throws ShapeError unless dtype and geometry agree on the item size and num_tokens is 1 to
  /// block_tokens.
  BlockView(const Geometry& geometry, DType dtype, std::uint64_t num_tokens);

  [[nodiscard]] PlaneShape shape(std::size_t plane, std::size_t segment_tokens) const noexcept {
    return PlaneShape{geometry.kv_heads(), num_tokens, geometry.dim(plane), dtype, segment_tokens};
  }
  /// Elements of a plane, which is also the length of each of its byte streams.
  [[nodiscard]] std::size_t elements(std::size_t plane) const noexcept {
    return geometry.kv_heads() * num_tokens * geometry.dim(plane);
  }
  /// A plane's rows in a slot.
  template <typename Byte>
  [[nodiscard]] PlaneRows<Byte> rows(Byte* slot, std::size_t plane) const noexcept {
    return PlaneRows<Byte>{slot + geometry.plane_offset(plane),
                           static_cast<std::ptrdiff_t>(geometry.head_nbytes(plane)),
                           static_cast<std::ptrdiff_t>(geometry.row_nbytes(plane))};
  }
};

/// Most bytes that a record of `block` can take: header and directory plus all planes stored raw.
[[nodiscard]] std::size_t record_bound(const BlockView& block) noexcept;

/// Writes the byte streams of all planes to `streams`, plane after plane, lowest byte first,
/// without gaps.
/// @throws ShapeError when `streams` is too small.
void split_planes(const BlockView& block, ConstBytes slot, Bytes streams);

/// How planes are stored.
struct WriterSettings {
  Profile profile = Profile::kRaw;
  int key_mult = 0;                          ///< lossy profiles
  int value_mult = 0;                        ///< lossy profiles
  bool has_channel_values = false;           ///< lossy profiles: one step per channel of V
  bool has_exact_keys = false;               ///< lossy profiles: K as in profile lossless
  const Calibration* calibration = nullptr;  ///< lossy profiles; null: each block measures itself
  /// Profile zstd: which planes are split, and itemsize stored streams for each of these, in plane
  /// order, lowest byte first.
  std::vector<bool> is_split;
  std::vector<ConstBytes> streams;
};

/// Writes a whole record to `out`.
/// @return bytes written.
/// @throws ShapeError when an argument does not fit.
std::size_t encode_record(const BlockView& block,
                          const WriterSettings& settings,
                          std::uint64_t first_token,
                          ConstBytes slot,
                          Bytes out);

/// Consecutive planes of a record, of which `data` holds the bytes from `data_offset` on.
struct RecordPart {
  std::size_t first_plane;
  std::vector<PlaneEntry> planes;
  std::size_t segment_tokens;
  ConstBytes data;
  std::uint64_t data_offset;
  /// Planes at the front that are there only because later ones are of their group.
  std::size_t num_leading = 0;

  [[nodiscard]] std::size_t num_wanted() const noexcept { return planes.size() - num_leading; }
  [[nodiscard]] std::size_t first_wanted() const noexcept { return first_plane + num_leading; }
};

/// One stored stream: a range of RecordPart::data; compressed unless it is as long as its plane has
/// elements.
struct StoredStream {
  std::uint64_t offset;
  std::uint64_t nbytes;
};

/// Verifies lengths and checksums of the wanted planes of `part`, and lists the streams of those of
/// coding split.
///
/// `part` is untrusted, entries included. Nothing is decoded yet.
/// @throws CorruptRecord that names the plane, ShapeError when planes lie outside the geometry or
/// before the data.
[[nodiscard]] std::vector<StoredStream> open_planes(const BlockView& block, const RecordPart& part);

/// Decodes the wanted planes of `part`, which open_planes has accepted; touches the wanted rows
/// only.
/// @param streams      the streams of open_planes, decompressed.
/// @param calibration  what the record was written with; null when it needs none.
/// @param window       the wanted heads and tokens.
/// @param targets      one per wanted plane; where its wanted rows go.
/// @throws ShapeError, CorruptRecord; contents of those rows are unspecified then.
void decode_planes(const BlockView& block,
                   const RecordPart& part,
                   const std::vector<ConstBytes>& streams,
                   const Calibration* calibration,
                   const Window& window,
                   const std::vector<TargetRows>& targets);

/// @throws ShapeError when a slot of `nbytes` does not hold the block.
void check_slot(const BlockView& block, std::size_t nbytes);

/// @throws ShapeError when the calibration is of another geometry.
void check_calibration(const BlockView& block, const Calibration* calibration);

}  // namespace kv
