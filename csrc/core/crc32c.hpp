// SPDX-License-Identifier: Apache-2.0
// CRC32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of everything stored.
#pragma once

#include <cstdint>

#include "core/span.hpp"

namespace kv {

/// CRC32C of `data`, continued from `seed`: crc32c(b, crc32c(a)) == crc32c(a + b).
///
/// Uses the CPU's instruction where there is one: about 8 bytes a cycle. Thread-safe.
[[nodiscard]] std::uint32_t crc32c(ConstBytes data, std::uint32_t seed = 0) noexcept;

/// The same, by tables: the fallback, and what the instruction is tested against.
[[nodiscard]] std::uint32_t crc32c_table(ConstBytes data, std::uint32_t seed = 0) noexcept;

}  // namespace kv
