// SPDX-License-Identifier: Apache-2.0
// Look-ups of many lanes by plain loads, two places at a time. They beat the gather instruction,
// which some CPUs run from microcode and others slow down for safety.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/cpu.hpp"
#include "entropy/rans.hpp"

#ifdef KV_X86
#include <immintrin.h>

namespace kv {

/// Where in the table a step looks its lanes up.
struct alignas(64) Places {
  std::array<std::uint32_t, kLanes> at;
};

/// Compilers would take the places out of the vectors they were stored from, one by one, which is
/// slower than loading them.
KV_INLINE void keep_in_memory(Places& places) noexcept { asm("" : "+m"(places)); }

/// The entries at four places.
KV_TARGET_AVX2 KV_INLINE __m128i look_up_4(const ReadEntry* table,
                                           const std::uint32_t* places) noexcept {
  std::uint64_t first;
  std::uint64_t second;
  std::memcpy(&first, places, sizeof(first));
  std::memcpy(&second, places + 2, sizeof(second));
  const auto entry = [table](std::uint64_t place) { return static_cast<int>(table[place]); };
  __m128i entries = _mm_cvtsi32_si128(entry(first & 0xFFFFFFFFU));
  entries = _mm_insert_epi32(entries, entry(first >> 32), 1);
  entries = _mm_insert_epi32(entries, entry(second & 0xFFFFFFFFU), 2);
  return _mm_insert_epi32(entries, entry(second >> 32), 3);
}

}  // namespace kv

#endif
