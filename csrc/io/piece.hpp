// SPDX-License-Identifier: Apache-2.0
// One transfer on its way, and what a system call's result means for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "io/direct_file.hpp"

namespace kv {

enum class Direction { kRead, kWrite };

/// Bytes between one place of a file and one of memory. Engines call the system and hand its
/// results to `settle`, again and again until all bytes are through: a short count is no end, and
/// no error.
struct Piece {
  std::shared_ptr<DirectFile> file;
  Direction direction = Direction::kRead;
  // Reads write through it; for writes it is only ever viewed as const.
  std::uint8_t* memory = nullptr;
  std::size_t nbytes = 0;
  std::uint64_t file_offset = 0;
  std::size_t op = 0;    ///< which transfer of its batch it belongs to
  std::size_t done = 0;  ///< bytes through so far
  // Taken before the first try: another thread's fall-back must not make this one's EINVAL final.
  bool may_fall_back = false;

  [[nodiscard]] std::uint8_t* rest() const noexcept { return memory + done; }
  [[nodiscard]] std::size_t rest_nbytes() const noexcept { return nbytes - done; }
  [[nodiscard]] std::uint64_t rest_offset() const noexcept { return file_offset + done; }

  /// Takes in one result: a count of bytes, or a negative errno.
  /// @return true when the piece is complete, false when the rest has to be tried.
  /// @throws CapacityError, IoError; a file that ends early is an IoError, never a short result.
  [[nodiscard]] bool settle(std::int64_t result);

  /// Moves all bytes by pread or pwrite on this thread; throws like `settle`.
  void transfer();
};

}  // namespace kv
