// SPDX-License-Identifier: Apache-2.0
// One plane of a record: its sizes, its directory entry, its rows in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/span.hpp"
#include "elements/dtype.hpp"
#include "entropy/segments.hpp"

namespace kv {

enum class Coding : std::uint8_t {
  kRaw = 0,
  kSplit = 1,
  kExponent = 2,
  kQuantised = 3,
  kBasis = 4
};

/// @throws ShapeError when the number is not one of FORMAT.md's; for numbers that come from
/// callers, not from disk.
[[nodiscard]] DType dtype_from(unsigned number);
[[nodiscard]] Coding coding_from(unsigned number);

/// `K of layer 3`.
[[nodiscard]] std::string plane_name(std::size_t plane);

constexpr std::size_t kPlaneAlignment = 16;
constexpr unsigned kMaxLowBits = 3;
constexpr std::size_t kMaxRawRows = 4;
/// scale_class of planes whose scales are stored as bytes.
constexpr std::uint8_t kStoredScales = 255;
/// Sections of a plane begin at multiples of this.
constexpr std::size_t kSectionAlignment = 4;

/// One directory entry, with what follows from the entries before it and from the geometry.
struct PlaneEntry {
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t raw_nbytes = 0;
  std::uint32_t crc32c = 0;
  Coding coding = Coding::kRaw;
  std::uint8_t transform = 0;
  std::int8_t mult = 0;
  std::uint8_t low_bits = 0;
  std::uint8_t raw_rows = 0;
  std::uint8_t scale_class = 0;
  std::uint16_t segment_heads = 0;

  [[nodiscard]] std::uint64_t padded_nbytes() const noexcept {
    return round_up(nbytes, kPlaneAlignment);
  }
};

/// Sizes of one plane, as everything that codes it needs them.
struct PlaneShape {
  std::size_t heads;
  std::size_t tokens;
  std::size_t dim;
  DType dtype;
  std::size_t segment_tokens;

  [[nodiscard]] std::size_t itemsize() const noexcept { return itemsize_of(dtype); }
  [[nodiscard]] std::size_t row_nbytes() const noexcept { return dim * itemsize(); }
  [[nodiscard]] std::uint64_t elements() const noexcept {
    return std::uint64_t{heads} * tokens * dim;
  }
  [[nodiscard]] std::uint64_t raw_nbytes() const noexcept { return elements() * itemsize(); }
  [[nodiscard]] SegmentGrid grid(std::size_t raw_rows, std::size_t segment_heads) const noexcept {
    return SegmentGrid{heads, dim, tokens - raw_rows, segment_heads, segment_tokens};
  }
};

/// Rows of one plane in memory: elements of a row are contiguous, rows and heads lie anywhere.
template <typename Byte>
struct PlaneRows {
  Byte* data;
  std::ptrdiff_t head_stride;   ///< bytes
  std::ptrdiff_t token_stride;  ///< bytes

  [[nodiscard]] Byte* row(std::size_t head, std::size_t token) const noexcept {
    return data + static_cast<std::ptrdiff_t>(head) * head_stride +
           static_cast<std::ptrdiff_t>(token) * token_stride;
  }
};
using SourceRows = PlaneRows<const std::uint8_t>;
using TargetRows = PlaneRows<std::uint8_t>;

/// The heads and tokens of a plane that a caller wants.
struct Window {
  std::size_t first_head;
  std::size_t num_heads;
  std::size_t first_token;
  std::size_t num_tokens;

  [[nodiscard]] bool has(std::size_t head, std::size_t token) const noexcept {
    return head - first_head < num_heads && token - first_token < num_tokens;
  }
};

/// Where the wanted rows go: `rows` begins with the window's first head and token.
struct WindowTarget {
  Window window;
  TargetRows rows;

  [[nodiscard]] std::uint8_t* row(std::size_t head, std::size_t token) const noexcept {
    return rows.row(head - window.first_head, token - window.first_token);
  }
};

/// Appends the sections of a plane to room that may be too small.
class SectionWriter {
 public:
  explicit SectionWriter(Bytes room) noexcept : room_(room) {}

  /// Room for `nbytes`; null when there is not enough, and from then on.
  [[nodiscard]] std::uint8_t* take(std::uint64_t nbytes) noexcept {
    if (is_full_ || nbytes > room_.size() - at_) {
      is_full_ = true;
      return nullptr;
    }
    std::uint8_t* taken = room_.data() + at_;
    at_ += static_cast<std::size_t>(nbytes);
    return taken;
  }
  void append(const void* data, std::size_t nbytes) noexcept;
  /// Zeros up to the next section.
  void pad() noexcept;

  [[nodiscard]] bool is_full() const noexcept { return is_full_; }
  [[nodiscard]] std::size_t nbytes() const noexcept { return at_; }

 private:
  Bytes room_;
  std::size_t at_ = 0;
  bool is_full_ = false;
};

}  // namespace kv
