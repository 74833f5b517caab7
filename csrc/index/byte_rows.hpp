// SPDX-License-Identifier: Apache-2.0
// Rows of vectors kept as bytes, and their inner products with queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.hpp"

namespace kv {

/// Rows and channels of the smallest piece that is read at once: a cache line.
inline constexpr std::size_t kBlockRows = 16;
inline constexpr std::size_t kGroupChannels = 4;
inline constexpr std::size_t kBlockGroupNbytes = kBlockRows * kGroupChannels;

/// Widest row: sums of products with a byte must fit 32 bits while a query keeps 9 bits.
inline constexpr std::size_t kMostChannels = 1U << 14U;

/// Rows of some partitions; frees nothing.
///
/// An element is `low[channel] + step[channel] * code`, `low` and `step` being those of its
/// partition. Codes are `[partitions][blocks of 16 rows][groups of 4 channels][16][4]`, so that one
/// vector holds the same channels of 16 rows, and sums need no reduction across a vector; what is
/// missing to whole blocks and groups is any byte.
class ByteRows {
 public:
  /// @throws ShapeError when the spans are not of these sizes, or a size is 0 or beyond the limits.
  ByteRows(ConstBytes codes,
           ConstBytes low,
           ConstBytes step,
           std::size_t partitions,
           std::size_t rows,
           std::size_t width);

  [[nodiscard]] std::size_t partitions() const noexcept { return partitions_; }
  [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
  [[nodiscard]] std::size_t width() const noexcept { return width_; }
  [[nodiscard]] std::size_t groups() const noexcept {
    return (width_ + kGroupChannels - 1) / kGroupChannels;
  }
  [[nodiscard]] std::size_t nbytes() const noexcept { return codes_.size(); }
  [[nodiscard]] const std::uint8_t* codes(std::size_t partition) const noexcept {
    return codes_.data() + partition * (codes_.size() / partitions_);
  }
  [[nodiscard]] const float* low(std::size_t partition) const noexcept {
    return low_ + partition * width_;
  }
  [[nodiscard]] const float* step(std::size_t partition) const noexcept {
    return step_ + partition * width_;
  }

 private:
  ConstBytes codes_;
  const float* low_;
  const float* step_;
  std::size_t partitions_;
  std::size_t rows_;
  std::size_t width_;
};

/// Makes codes of `[partitions, rows, width]` elements, all finite and below 1e30 in size.
///
/// Each channel of a partition gets 255 equal steps from its smallest to its largest element.
/// @throws ShapeError like ByteRows, also when `rows` has another size.
void encode_byte_rows(ConstBytes rows,
                      Bytes codes,
                      Bytes low,
                      Bytes step,
                      std::size_t partitions,
                      std::size_t num_rows,
                      std::size_t width);

/// What one index is asked.
struct ScoreJob {
  std::vector<const ByteRows*> segments;  ///< rows one behind the other
  const float* queries;                   ///< [partitions, num_queries, width]
  float* scores;                          ///< [partitions, num_queries, stride]
  std::size_t num_queries;
  std::size_t stride;  ///< at least the rows of all segments; what is beyond them is not written
};

/// Inner products of all queries with all rows of their partition, for all jobs together.
///
/// Weights of a query are rounded to 15 bits of its largest one (fewer above 516 channels); sums of
/// products are exact, so every machine and any number of threads gives the same scores.
/// Memory-bound: one byte per element is read. Uses up to `num_threads` threads, this one included,
/// where there is enough work for them.
void score_byte_rows(const std::vector<ScoreJob>& jobs, std::size_t num_threads);

}  // namespace kv
