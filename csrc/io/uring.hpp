// SPDX-License-Identifier: Apache-2.0
// One io_uring, by system calls alone: "Efficient IO with io_uring" (Axboe, 2019),
// io_uring_setup(2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "io/piece.hpp"

namespace kv {

/// Owns the ring's descriptor and maps. Created by any thread; from `enable` on one thread uses it.
class Uring {
 public:
  /// What one submission came to.
  struct Completion {
    std::uint64_t tag;
    std::int64_t result;  ///< count of bytes, or a negative errno
  };

  /// @param num_entries  most submissions that are in flight at once.
  /// @throws IoError when the kernel, a seccomp filter or a limit refuses, or lacks what is needed.
  explicit Uring(unsigned num_entries);
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;
  Uring(Uring&&) = delete;
  Uring& operator=(Uring&&) = delete;
  ~Uring();

  /// Makes the calling thread the one that uses the ring.
  void enable() noexcept;

  /// Prepares the rest of `piece`; its memory and file must live until the completion of `tag`.
  void prepare(const Piece& piece, std::uint64_t tag) noexcept;

  /// Prepares a read of 8 bytes of a descriptor.
  void prepare_wake(int descriptor, std::uint64_t* value, std::uint64_t tag) noexcept;

  /// Hands everything prepared to the kernel, and waits for a completion. With `least` above 1 it
  /// waits for so many, but for 100 microseconds at most: fewer calls and fewer wakes. What the
  /// kernel refuses for good ends as completions with that errno.
  void enter(unsigned least) noexcept;

  /// Takes one completion; false when there is none.
  [[nodiscard]] bool take(Completion& completion) noexcept;

 private:
  struct Entry;
  [[nodiscard]] Entry& next_entry() noexcept;
  [[nodiscard]] std::uint32_t* word(std::uint32_t offset) const noexcept;
  void set_up(unsigned num_entries);
  void check_operations() const;
  void check_entry() const;
  void release() noexcept;

  int descriptor_ = -1;
  bool needs_enabling_ = false;
  bool has_timed_waits_ = false;
  std::uint32_t num_prepared_ = 0;
  // Submissions that the kernel did not take, and how many of them `take` has given out.
  std::uint32_t num_refused_ = 0;
  std::uint32_t next_refused_ = 0;
  int refusal_ = 0;
  std::uint8_t* ring_ = nullptr;
  std::size_t ring_nbytes_ = 0;
  std::uint8_t* entries_ = nullptr;
  std::size_t entries_nbytes_ = 0;
  // Offsets into the ring, as the kernel gave them.
  std::uint32_t sq_tail_ = 0;
  std::uint32_t sq_mask_ = 0;
  std::uint32_t sq_array_ = 0;
  std::uint32_t cq_head_ = 0;
  std::uint32_t cq_tail_ = 0;
  std::uint32_t cq_mask_ = 0;
  std::uint32_t cqes_ = 0;
};

}  // namespace kv
