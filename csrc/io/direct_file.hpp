// SPDX-License-Identifier: Apache-2.0
// One open file, past the page cache where the file system allows it.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "core/error.hpp"

namespace kv {

/// Owns one file descriptor; the destructor closes it. Share it with std::shared_ptr: whoever still
/// transfers keeps the descriptor open. All methods may be called from any thread.
///
/// Opened with O_DIRECT; when the file system refuses that with EINVAL, at open or at the first
/// transfer, the file continues buffered. While `is_direct()`, offsets, lengths and addresses must
/// be multiples of kPageNbytes.
class DirectFile {
 public:
  /// Opens `path`, close-on-exec; a writable file is created when missing and never truncated.
  /// @throws IoError, CapacityError.
  DirectFile(const std::string& path, bool writable);
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;
  DirectFile(DirectFile&&) = delete;
  DirectFile& operator=(DirectFile&&) = delete;
  ~DirectFile();

  [[nodiscard]] bool is_direct() const noexcept { return is_direct_.load(); }
  [[nodiscard]] bool is_writable() const noexcept { return is_writable_; }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t size() const;
  /// The device that it lies on, by its number; that of a file system, where it has several.
  [[nodiscard]] dev_t device() const noexcept { return device_; }

  /// Reserves the first `nbytes` bytes on the medium; a longer file stays as long as it is. When
  /// that fails the file keeps its old size.
  /// @throws CapacityError when the file system is full.
  void preallocate(std::uint64_t nbytes);

  /// Returns when all data written so far would survive a power loss.
  void sync();

  /// Asks the kernel to forget cached pages of this file; dirty ones stay.
  void drop_cache();

  /// For system calls on the file; valid as long as this object.
  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }

  /// Continues buffered, for this and all later transfers: O_DIRECT is not possible here after all.
  void leave_direct_mode();

 private:
  [[nodiscard]] std::string about(const char* verb) const;

  std::string path_;
  bool is_writable_;
  std::atomic<bool> is_direct_{false};
  int descriptor_ = -1;
  dev_t device_ = 0;
};

}  // namespace kv
