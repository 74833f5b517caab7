// SPDX-License-Identifier: Apache-2.0
// Folds queries, and shares the rows of many segments out among threads.
#include "index/byte_rows.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>

#include "index/byte_loops.hpp"

namespace kv {
namespace {

constexpr std::size_t kMostPartitions = 1U << 16U;
constexpr std::size_t kMostRows = 1U << 24U;
// Less is read sooner than a thread starts.
constexpr std::size_t kThreadNbytes = 1U << 20U;
// 127 * 128, so that both halves of a weight fit a signed byte.
constexpr std::size_t kLargestWeight = 16256;
// Where floats have no fractions: adding it rounds, ties to even, in a loop that is vectorised.
constexpr float kRounding = 12582912.0F;
constexpr std::size_t kLargestSum = 0x7FFFFFFF;
constexpr std::size_t kLargestCode = 255;

// Memory for one folded query.
struct Fold {
  explicit Fold(std::size_t width) : weights(width), highs(width), lows(width), scaled(width) {}
  std::vector<std::int16_t> weights;
  std::vector<std::int8_t> highs;
  std::vector<std::int8_t> lows;
  std::vector<float> scaled;
};

// Sums run in sixteen lanes, in one order on every machine.
FoldedQuery folded(const float* query,
                   const float* low,
                   const float* step,
                   std::size_t width,
                   std::size_t padded,
                   Fold& fold) noexcept {
  constexpr std::size_t kLanes = 16;
  std::array<float, kLanes> biases{};
  std::array<float, kLanes> maxima{};
  for (std::size_t i = 0; i < width; ++i) {
    const float weight = query[i] * step[i];
    fold.scaled[i] = weight;
    biases[i % kLanes] += query[i] * low[i];
    maxima[i % kLanes] = std::max(maxima[i % kLanes], std::fabs(weight));
  }
  float bias = 0;
  float largest = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    bias += biases[lane];
    largest = std::max(largest, maxima[lane]);
  }
  const std::size_t limit = std::min(kLargestWeight, kLargestSum / (kLargestCode * padded));
  const float unit = largest / static_cast<float>(limit);
  // Neither an infinite query nor one too small to be divided by may become an undefined integer.
  const float inverse = std::isfinite(1 / unit) ? 1 / unit : 0;
  const auto bound = static_cast<float>(limit);
  for (std::size_t i = 0; i < width; ++i) {
    // In this order, what is no number becomes -bound.
    const float kept = std::min(bound, std::max(-bound, fold.scaled[i] * inverse));
    const int weight = static_cast<int>((kept + kRounding) - kRounding);
    const int high = (weight + (weight < 0 ? -64 : 64)) / 128;
    fold.weights[i] = static_cast<std::int16_t>(weight);
    fold.highs[i] = static_cast<std::int8_t>(high);
    fold.lows[i] = static_cast<std::int8_t>(weight - 128 * high);
  }
  for (std::size_t i = width; i < padded; ++i) {
    fold.weights[i] = 0;
    fold.highs[i] = 0;
    fold.lows[i] = 0;
  }
  return {fold.weights.data(), fold.highs.data(), fold.lows.data(), unit, bias};
}

// One partition of one segment: what a thread takes at a time.
struct Piece {
  const ScoreJob* job;
  const ByteRows* rows;
  std::size_t partition;
  std::size_t column;  ///< of the first row, among the scores
};

void score_piece(const Piece& piece, ByteLoop loop, Fold& fold) noexcept {
  const ByteRows& rows = *piece.rows;
  const ScoreJob& job = *piece.job;
  const std::size_t whole = rows.rows() / kBlockRows;
  const std::size_t rest = rows.rows() % kBlockRows;
  const std::size_t groups = rows.groups();
  const std::uint8_t* codes = rows.codes(piece.partition);
  for (std::size_t number = 0; number < job.num_queries; ++number) {
    const std::size_t line = piece.partition * job.num_queries + number;
    const FoldedQuery query =
        folded(job.queries + line * rows.width(), rows.low(piece.partition),
               rows.step(piece.partition), rows.width(), groups * kGroupChannels, fold);
    float* scores = job.scores + line * job.stride + piece.column;
    loop(codes, whole, groups, query, scores);
    if (rest != 0) {
      std::array<float, kBlockRows> last{};
      loop(codes + whole * groups * kBlockGroupNbytes, 1, groups, query, last.data());
      std::memcpy(scores + whole * kBlockRows, last.data(), rest * sizeof(float));
    }
  }
}

}  // namespace

ByteRows::ByteRows(ConstBytes codes,
                   ConstBytes low,
                   ConstBytes step,
                   std::size_t partitions,
                   std::size_t rows,
                   std::size_t width)
    : codes_(codes),
      low_(reinterpret_cast<const float*>(low.data())),
      step_(reinterpret_cast<const float*>(step.data())),
      partitions_(partitions),
      rows_(rows),
      width_(width) {
  KV_EXPECT(partitions >= 1 && partitions <= kMostPartitions && rows >= 1 && rows <= kMostRows &&
                width >= 1 && width <= kMostChannels,
            ShapeError,
            std::to_string(partitions) + " partitions of " + std::to_string(rows) + " rows of " +
                std::to_string(width) + " bytes are none, or too many");
  const std::size_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const std::size_t parameters = partitions * width * sizeof(float);
  // At most 2^16 * 2^20 * 2^12 * 2^6 bytes: no product wraps.
  KV_EXPECT(codes.size() == partitions * blocks * groups() * kBlockGroupNbytes &&
                low.size() == parameters && step.size() == parameters,
            ShapeError, "codes, low or step do not have the size of their rows");
  KV_EXPECT((reinterpret_cast<std::uintptr_t>(low_) | reinterpret_cast<std::uintptr_t>(step_)) %
                    alignof(float) ==
                0,
            ShapeError, "low and step are not aligned to floats");
}

void score_byte_rows(const std::vector<ScoreJob>& jobs, std::size_t num_threads) {
  std::vector<Piece> pieces;
  std::size_t nbytes = 0;
  std::size_t padded = 1;
  for (const ScoreJob& job : jobs) {
    std::size_t column = 0;
    for (const ByteRows* rows : job.segments) {
      for (std::size_t partition = 0; partition < rows->partitions(); ++partition) {
        pieces.push_back({&job, rows, partition, column});
      }
      column += rows->rows();
      nbytes += rows->nbytes();
      padded = std::max(padded, rows->groups() * kGroupChannels);
    }
  }
  const std::size_t most = std::min(nbytes / kThreadNbytes, pieces.size());
  const std::size_t used = std::max<std::size_t>(1, std::min(num_threads, most));
  std::vector<Fold> folds(used, Fold(padded));
  const ByteLoop loop = byte_loop();
  std::atomic<std::size_t> next{0};
  const auto work = [&pieces, &next, loop](Fold& fold) noexcept {
    for (std::size_t at = next++; at < pieces.size(); at = next++) {
      score_piece(pieces[at], loop, fold);
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(used - 1);
  for (std::size_t number = 1; number < used; ++number) {
    try {
      threads.emplace_back(work, std::ref(folds[number]));
    } catch (const std::system_error&) {
      break;  // no more threads are to be had: those there are do the work
    }
  }
  work(folds[0]);
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace kv
