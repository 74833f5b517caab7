// SPDX-License-Identifier: Apache-2.0
// Slots <-> records. The zstd step of coding 1 lies outside: callers compress and decompress the
// streams in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

  [[nodiscard]] std::size_t rows() const noexcept { return geometry.kv_heads() * num_tokens; }
  /// Elements of a plane, which is also the length of each of its byte streams.
  [[nodiscard]] std::size_t elements(std::size_t plane) const noexcept {
    return rows() * geometry.dim(plane);
  }
  /// Contiguous bytes of one head: its valid rows.
  [[nodiscard]] std::size_t run_nbytes(std::size_t plane) const noexcept {
    return num_tokens * geometry.row_nbytes(plane);
  }
  /// Offset in the slot of that run.
  [[nodiscard]] std::size_t run_offset(std::size_t plane, std::size_t head) const noexcept {
    return geometry.plane_offset(plane) + head * geometry.head_nbytes(plane);
  }
};

/// Most bytes that a record of `block` can take: header and directory plus all planes stored raw.
[[nodiscard]] std::size_t record_bound(const BlockView& block) noexcept;

/// Planes that hold an infinity or a NaN.
[[nodiscard]] std::vector<std::size_t> nonfinite_planes(const BlockView& block, ConstBytes slot);

/// Writes the byte streams of `planes` to `streams`, plane after plane, lowest byte first, without
/// gaps.
/// @throws ShapeError when `streams` is too small or a plane does not exist.
void split_planes(const BlockView& block,
                  ConstBytes slot,
                  const std::vector<std::size_t>& planes,
                  Bytes streams);

/// Writes a whole record to `out`.
/// @param codings  one per plane; must be allowed by `profile` and give fewer bytes than raw
/// (except raw itself).
/// @param streams  itemsize stored streams for each plane of coding split, in plane order, lowest
/// byte first.
/// @return         bytes written.
/// @throws ShapeError when an argument does not fit. Allocates the directory only.
std::size_t encode_record(const BlockView& block,
                          Profile profile,
                          std::uint64_t first_token,
                          ConstBytes slot,
                          const std::vector<Coding>& codings,
                          const std::vector<ConstBytes>& streams,
                          Bytes out);

/// Consecutive planes of a record, of which `data` holds the bytes from `data_offset` on.
struct RecordPart {
  std::size_t first_plane;
  std::vector<PlaneEntry> planes;
  ConstBytes data;
  std::uint64_t data_offset;
};

/// One stored stream: a range of RecordPart::data; compressed unless it is as long as its plane has
/// elements.
struct StoredStream {
  std::uint64_t offset;
  std::uint64_t nbytes;
};

/// Verifies lengths and checksums of all planes of `part`, and lists the streams of those of coding
/// split.
///
/// `part` is untrusted, entries included. Nothing is decoded yet.
/// @throws CorruptRecord that names the plane, ShapeError when planes lie outside the geometry or
/// before the data.
[[nodiscard]] std::vector<StoredStream> open_planes(const BlockView& block, const RecordPart& part);

/// Decodes the planes of `part`, which open_planes has accepted, into the rows of `slot`; touches
/// no other byte.
/// @param streams  the streams of open_planes, decompressed.
/// @throws ShapeError, CorruptRecord; contents of those rows are unspecified then.
void decode_planes(const BlockView& block,
                   const RecordPart& part,
                   const std::vector<ConstBytes>& streams,
                   Bytes slot);

}  // namespace kv
