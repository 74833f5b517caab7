// SPDX-License-Identifier: Apache-2.0
// Scores of byte rows in buffers of exactly their size, on one thread and on several, for the
// checkers to watch.
#include <cstdint>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/crc32c.hpp"
#include "index/byte_rows.hpp"

namespace {

using Buffer = std::vector<std::uint8_t>;

struct Sizes {
  std::size_t partitions;
  std::size_t rows;
  std::size_t width;
  std::size_t num_queries;
};

std::size_t codes_nbytes(const Sizes& sizes) {
  return sizes.partitions * ((sizes.rows + 15) / 16) * ((sizes.width + 3) / 4) * 64;
}

std::vector<float> fractions(std::size_t count, std::mt19937& random) {
  std::vector<float> found(count);
  for (float& value : found) {
    value = static_cast<float>(random() % 4096) / 1024.0F - 2.0F;
  }
  return found;
}

kv::ConstBytes bytes_of(const std::vector<float>& values) {
  return {reinterpret_cast<const std::uint8_t*>(values.data()), values.size() * sizeof(float)};
}

kv::Bytes writable(std::vector<float>& values) {
  return {reinterpret_cast<std::uint8_t*>(values.data()), values.size() * sizeof(float)};
}

unsigned scores_checksum(const Sizes& sizes, std::size_t num_threads, unsigned seed) {
  std::mt19937 random(7);
  Buffer codes(codes_nbytes(sizes));
  const std::vector<float> elements =
      fractions(sizes.partitions * sizes.rows * sizes.width, random);
  std::vector<float> low(sizes.partitions * sizes.width);
  std::vector<float> step(low.size());
  kv::encode_byte_rows(bytes_of(elements), {codes.data(), codes.size()}, writable(low),
                       writable(step), sizes.partitions, sizes.rows, sizes.width);
  for (std::size_t at = 0; at < low.size(); ++at) {
    const float first = elements[at / sizes.width * sizes.rows * sizes.width + at % sizes.width];
    CHECK(first >= low[at] && first <= low[at] + 255.001F * step[at] + 1e-5F);
  }
  const std::size_t lines = sizes.partitions * sizes.num_queries;
  const std::vector<float> queries = fractions(lines * sizes.width, random);
  const kv::ByteRows rows({codes.data(), codes.size()}, bytes_of(low), bytes_of(step),
                          sizes.partitions, sizes.rows, sizes.width);
  std::vector<float> scores(lines * 2 * sizes.rows);
  kv::score_byte_rows(
      {{{&rows, &rows}, queries.data(), scores.data(), sizes.num_queries, 2 * sizes.rows}},
      num_threads);
  for (std::size_t line = 0; line < lines; ++line) {
    for (std::size_t row = 0; row < sizes.rows; ++row) {
      const float* at = scores.data() + line * 2 * sizes.rows + row;
      CHECK(at[0] == at[sizes.rows]);
    }
  }
  return kv::crc32c(bytes_of(scores), seed);
}

}  // namespace

unsigned test_index(unsigned seed) {
  for (const Sizes& sizes : {Sizes{1, 1, 1, 1}, Sizes{2, 15, 3, 2}, Sizes{2, 16, 4, 1},
                             Sizes{3, 17, 5, 3}, Sizes{1, 33, 517, 2}, Sizes{1, 3, 16384, 1}}) {
    seed = scores_checksum(sizes, 1, seed);
  }
  const Sizes large{4, 5000, 128, 1};
  const unsigned alone = scores_checksum(large, 1, seed);
  CHECK(alone == scores_checksum(large, 4, seed));
  const Buffer codes(64);
  std::vector<float> low(1);
  const kv::ConstBytes code_bytes(codes.data(), codes.size());
  const auto made = [&](std::size_t partitions, std::size_t rows, std::size_t width) {
    return kv::ByteRows(code_bytes, bytes_of(low), bytes_of(low), partitions, rows, width);
  };
  CHECK(made(1, 16, 1).rows() == 16);
  CHECK_THROWS(made(1, 17, 1), kv::ShapeError);
  CHECK_THROWS(made(1, 16, 2), kv::ShapeError);
  CHECK_THROWS(made(std::size_t{1} << 60, std::size_t{1} << 60, std::size_t{1} << 60),
               kv::ShapeError);
  Buffer target(64);
  CHECK_THROWS(kv::encode_byte_rows(bytes_of(low), {target.data(), 64}, writable(low),
                                    writable(low), 1, 2, 1),
               kv::ShapeError);
  return alone;
}
