// SPDX-License-Identifier: Apache-2.0
// Slicing-by-8 tables, three interleaved runs of the SSE4.2 instruction, and folding by carry-less
// multiplication.
#include "core/crc32c.hpp"

#include <array>
#include <cstddef>

#include "core/cpu.hpp"
#include "core/endian.hpp"

#ifdef KV_X86
// GCC's own header passes vectors without a value where none is needed, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace kv {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78U;

// kSlices[k][b]: register after byte b and k zero bytes, so eight bytes cost eight independent
// look-ups.
using Slices = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Slices make_slices() {
  Slices slices{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1U) != 0 ? kPolynomial : 0U);
    }
    slices[0][byte] = crc;
  }
  for (std::size_t slice = 1; slice < 8; ++slice) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = slices[slice - 1][byte];
      slices[slice][byte] = (before >> 8) ^ slices[0][before & 0xFFU];
    }
  }
  return slices;
}

constexpr Slices kSlices = make_slices();

// The CRC register after 2^k zero bytes is a linear map of the register: 32 columns over GF(2).
using Matrix = std::array<std::uint32_t, 32>;
// That map, tabled per byte of the register.
using ShiftTable = std::array<std::array<std::uint32_t, 256>, 4>;

constexpr std::uint32_t apply(const Matrix& matrix, std::uint32_t vector) {
  std::uint32_t sum = 0;
  for (std::size_t bit = 0; vector != 0; ++bit, vector >>= 1) {
    if ((vector & 1U) != 0) {
      sum ^= matrix[bit];
    }
  }
  return sum;
}

constexpr ShiftTable make_shift(std::size_t log2_nbytes) {
  Matrix matrix{};
  for (std::size_t bit = 0; bit < 32; ++bit) {  // one zero byte
    const std::uint32_t crc = 1U << bit;
    matrix[bit] = (crc >> 8) ^ kSlices[0][crc & 0xFFU];
  }
  for (std::size_t step = 0; step < log2_nbytes; ++step) {
    Matrix squared{};
    for (std::size_t bit = 0; bit < 32; ++bit) {
      squared[bit] = apply(matrix, matrix[bit]);
    }
    matrix = squared;
  }
  ShiftTable table{};
  for (std::size_t position = 0; position < 4; ++position) {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      table[position][byte] = apply(matrix, byte << (8 * position));
    }
  }
  return table;
}

#ifdef KV_X86
// The instruction takes 3 cycles and starts every cycle: three runs side by side keep it busy. Long
// runs for bulk, short ones so that small planes profit too.
constexpr std::size_t kLongLog2 = 12;
constexpr std::size_t kShortLog2 = 8;
constexpr ShiftTable kLongShift = make_shift(kLongLog2);
constexpr ShiftTable kShortShift = make_shift(kShortLog2);

std::uint32_t shift(const ShiftTable& table, std::uint32_t crc) noexcept {
  return table[0][crc & 0xFFU] ^ table[1][(crc >> 8) & 0xFFU] ^ table[2][(crc >> 16) & 0xFFU] ^
         table[3][crc >> 24];
}

KV_TARGET_CRC std::uint32_t three_runs(const std::uint8_t* data,
                                       std::size_t run_nbytes,
                                       const ShiftTable& table,
                                       std::uint32_t crc) noexcept {
  std::uint64_t first = crc;
  std::uint64_t second = 0;
  std::uint64_t third = 0;
  for (std::size_t at = 0; at < run_nbytes; at += 8) {
    first = _mm_crc32_u64(first, load_le<std::uint64_t>(data + at));
    second = _mm_crc32_u64(second, load_le<std::uint64_t>(data + run_nbytes + at));
    third = _mm_crc32_u64(third, load_le<std::uint64_t>(data + 2 * run_nbytes + at));
  }
  const std::uint32_t joined =
      shift(table, static_cast<std::uint32_t>(first)) ^ static_cast<std::uint32_t>(second);
  return shift(table, joined) ^ static_cast<std::uint32_t>(third);
}

// x^n modulo the polynomial, for carry-less products of reflected operands, which come out one bit
// too low.
constexpr long long folding_factor(unsigned n) {
  std::uint32_t power = 1U << 31;
  for (unsigned i = 0; i < n; ++i) {
    power = (power >> 1) ^ ((power & 1U) != 0 ? kPolynomial : 0U);
  }
  return static_cast<long long>(std::uint64_t{power} << 1);
}

constexpr std::size_t kFoldedNbytes = 256;

// Folds whole multiples of 256 bytes, at least one, into 256 bytes of the same remainder: four
// vectors, each moved past the other three in every round (Gopal et al., Intel 2009).
KV_TARGET_CLMUL void fold(const std::uint8_t* data,
                          std::size_t nbytes,
                          std::uint32_t crc,
                          std::uint8_t* folded) noexcept {
  constexpr unsigned kDistance = 8 * kFoldedNbytes;
  const __m512i factors = _mm512_broadcast_i32x4(
      _mm_set_epi64x(folding_factor(kDistance - 32), folding_factor(kDistance + 32)));
  __m512i sums[4];
  for (int i = 0; i < 4; ++i) {
    sums[i] = _mm512_loadu_si512(data + 64 * i);
  }
  sums[0] =
      _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  for (std::size_t at = kFoldedNbytes; at < nbytes; at += kFoldedNbytes) {
    for (int i = 0; i < 4; ++i) {
      constexpr int kXorOfThree = 0x96;
      sums[i] = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(sums[i], factors, 0x00),
                                          _mm512_clmulepi64_epi128(sums[i], factors, 0x11),
                                          _mm512_loadu_si512(data + at + 64 * i), kXorOfThree);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(folded + 64 * i, sums[i]);
  }
}

KV_TARGET_CRC std::uint32_t crc32c_instruction(ConstBytes bytes, std::uint32_t seed) noexcept {
  const std::uint8_t* data = bytes.data();
  std::size_t left = bytes.size();
  std::uint32_t crc = ~seed;
  if (left >= 2 * kFoldedNbytes && cpu_features().has_vector_clmul &&
      simd_level() == SimdLevel::kAvx512) {
    std::uint8_t folded[kFoldedNbytes];
    const std::size_t nbytes = left / kFoldedNbytes * kFoldedNbytes;
    fold(data, nbytes, crc, folded);
    crc = 0;
    for (std::size_t at = 0; at < kFoldedNbytes; at += 8) {
      crc = static_cast<std::uint32_t>(_mm_crc32_u64(crc, load_le<std::uint64_t>(folded + at)));
    }
    left -= nbytes;
    data += nbytes;
  }
  for (const bool is_long : {true, false}) {
    const std::size_t run_nbytes = std::size_t{1} << (is_long ? kLongLog2 : kShortLog2);
    const ShiftTable& table = is_long ? kLongShift : kShortShift;
    for (; left >= 3 * run_nbytes; left -= 3 * run_nbytes, data += 3 * run_nbytes) {
      crc = three_runs(data, run_nbytes, table, crc);
    }
  }
  for (; left >= 8; left -= 8, data += 8) {
    crc = static_cast<std::uint32_t>(_mm_crc32_u64(crc, load_le<std::uint64_t>(data)));
  }
  for (; left > 0; --left, ++data) {
    crc = _mm_crc32_u8(crc, *data);
  }
  return ~crc;
}
#endif

}  // namespace

std::uint32_t crc32c_table(ConstBytes bytes, std::uint32_t seed) noexcept {
  const std::uint8_t* data = bytes.data();
  std::size_t left = bytes.size();
  std::uint32_t crc = ~seed;
  for (; left >= 8; left -= 8, data += 8) {
    const std::uint64_t word = load_le<std::uint64_t>(data) ^ crc;
    crc = 0;
    for (std::size_t byte = 0; byte < 8; ++byte) {
      crc ^= kSlices[7 - byte][(word >> (8 * byte)) & 0xFFU];
    }
  }
  for (; left > 0; --left, ++data) {
    crc = (crc >> 8) ^ kSlices[0][(crc ^ *data) & 0xFFU];
  }
  return ~crc;
}

std::uint32_t crc32c(ConstBytes data, std::uint32_t seed) noexcept {
#ifdef KV_X86
  if (cpu_features().has_crc32c) {
    return crc32c_instruction(data, seed);
  }
#endif
  return crc32c_table(data, seed);
}

}  // namespace kv
