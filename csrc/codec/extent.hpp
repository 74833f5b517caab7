// SPDX-License-Identifier: Apache-2.0
// Records as they lie on disk: a header in front, zeros behind (docs/file-format.md, extent files).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/span.hpp"

namespace kv {

constexpr std::size_t kExtentHeaderNbytes = 64;

using BlockKey = std::array<std::uint8_t, 32>;

/// Puts the header in front of a record that lies behind its place, and zeros behind it.
/// @param key           of the block.
/// @param generation    number of the write.
/// @param record_nbytes the record's, which begins at kExtentHeaderNbytes of `room`.
/// @return bytes of the extent: whole pages.
/// @throws ShapeError when `room` ends before them.
std::size_t seal_extent(const BlockKey& key,
                        std::uint64_t generation,
                        std::uint64_t record_nbytes,
                        Bytes room);

/// Says whether an extent begins with the header of that write of that block, in good order, and is
/// long enough for its record.
/// @param extent  untrusted bytes.
[[nodiscard]] bool is_extent_of(ConstBytes extent,
                                const BlockKey& key,
                                std::uint64_t generation,
                                std::uint64_t record_nbytes);

}  // namespace kv
