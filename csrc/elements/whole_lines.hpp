// SPDX-License-Identifier: Apache-2.0
// Writing decoded rows past the caches. An ordinary store reads the cache line that it is about to
// replace, and a block is larger than the caches that would keep it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu.hpp"

#ifdef KV_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace kv {

inline constexpr std::size_t kLineNbytes = 64;

/// True when vectors of a line each, stored at `target` and `stride` bytes on, fill lines. Rows
/// that are all written to one place (stride 0) are not worth memory's time.
[[nodiscard]] inline bool fills_lines(const std::uint8_t* target, std::ptrdiff_t stride) noexcept {
  return stride != 0 &&
         (reinterpret_cast<std::uintptr_t>(target) | static_cast<std::uintptr_t>(stride)) %
                 kLineNbytes ==
             0;
}

/// Orders lines written past the caches before what this thread stores next, such as the word that
/// tells another thread of them.
inline void finish_lines() noexcept {
#ifdef KV_X86
  _mm_sfence();
#endif
}

#ifdef KV_X86
/// Stores a line; `past_caches` as fills_lines said.
KV_TARGET_AVX512 inline void store_line(std::uint8_t* to, __m512i line, bool past_caches) noexcept {
  if (past_caches) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
  } else {
    _mm512_storeu_si512(to, line);
  }
}
#endif

}  // namespace kv
