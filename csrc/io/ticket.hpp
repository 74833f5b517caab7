// SPDX-License-Identifier: Apache-2.0
// A submitted batch: what is left of it to begin, and how each of its transfers ended.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/span.hpp"
#include "io/direct_file.hpp"
#include "io/piece.hpp"

namespace kv {

/// One transfer: `nbytes` at `file_offset` of the file and `buffer_offset` of the buffer.
struct IoOp {
  std::uint64_t file_offset;
  std::uint64_t buffer_offset;
  std::uint64_t nbytes;
};

/// Throws unless this is process `owner`: threads and locks of a parent do not survive fork().
/// @throws ConfigError
void check_process(pid_t owner);

/// One batch of transfers between a file and a buffer. Shared by the engine, which takes pieces of
/// it, and the caller; any thread may ask, wait or cancel. A transfer that fails takes no other one
/// along.
class Ticket {
 public:
  using Clock = std::chrono::steady_clock;

  /// Transfers longer than this are moved in pieces, so that several can be in flight.
  static constexpr std::size_t kPieceNbytes = std::size_t{1} << 20;

  /// @param ops  checked by the caller: they lie inside `buffer` and are aligned where they must.
  Ticket(Direction direction,
         std::shared_ptr<DirectFile> file,
         Bytes buffer,
         std::vector<IoOp> ops);

  /// True when every transfer has ended, well, badly or cancelled; never blocks for I/O.
  [[nodiscard]] bool done() const;

  /// Blocks until done, or until the deadline. Rethrows the error of the first failed transfer,
  /// every time it is called.
  /// @return whether the batch is done.
  [[nodiscard]] bool wait_until(std::optional<Clock::time_point> deadline) const;
  void wait() const { static_cast<void>(wait_until(std::nullopt)); }

  /// Blocks until transfers have ended that this has not reported yet; returns their numbers, in
  /// order of their ends. Empty when all were reported, or when none has and it may not wait.
  [[nodiscard]] std::vector<std::size_t> wait_some(bool may_wait = true);

  /// Errors of the transfers that failed so far, by their numbers.
  [[nodiscard]] std::map<std::size_t, std::exception_ptr> errors() const;

  /// Ends what has not begun, as an IoError with ECANCELED; what has begun runs to its end.
  void cancel();

  [[nodiscard]] dev_t device() const noexcept { return file_->device(); }
  [[nodiscard]] Direction direction() const noexcept { return direction_; }

  /// For engines: the next piece to begin, of `most_nbytes` at most; none when all have begun.
  [[nodiscard]] std::optional<Piece> take(std::size_t most_nbytes = kPieceNbytes);

  /// For engines: a piece has ended; `error` is null when it went well.
  void finish(std::size_t op, std::exception_ptr error) noexcept;

 private:
  void end_pieces(std::size_t op, std::size_t count, std::exception_ptr error);

  const pid_t owner_process_;
  const Direction direction_;
  const std::shared_ptr<DirectFile> file_;
  const Bytes buffer_;
  const std::vector<IoOp> ops_;

  mutable std::mutex mutex_;
  mutable std::condition_variable all_ended_;
  std::condition_variable some_ended_;
  // The next piece to begin lies `next_at_` bytes into transfer `next_op_`.
  std::size_t next_op_ = 0;
  std::uint64_t next_at_ = 0;
  std::vector<std::size_t> pending_;  // pieces of each transfer that have not ended
  std::size_t num_pending_ops_ = 0;
  std::vector<std::size_t> ended_;  // transfers, in the order of their ends
  std::size_t num_reported_ = 0;
  std::map<std::size_t, std::exception_ptr> errors_;
};

}  // namespace kv
