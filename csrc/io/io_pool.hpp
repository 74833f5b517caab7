// SPDX-License-Identifier: Apache-2.0
// Threads that move bytes between files and memory, and the tickets by which callers learn how it
// went.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/span.hpp"
#include "io/direct_file.hpp"

namespace kv {

/// One transfer: `nbytes` at `file_offset` of the file and `buffer_offset` of the buffer.
struct IoOp {
  std::uint64_t file_offset;
  std::uint64_t buffer_offset;
  std::uint64_t nbytes;
};

enum class Direction { kRead, kWrite };

/// The outcome of one submitted batch. Shared by the pool and the caller; any thread may ask or
/// wait.
class Ticket {
 public:
  explicit Ticket(std::size_t num_pieces);

  /// True when every transfer of the batch has ended, well or badly; never blocks for I/O.
  [[nodiscard]] bool done() const;

  /// Blocks until done, then rethrows the first worker error, every time it is called.
  void wait() const;

 private:
  friend class IoPool;
  void finish_piece(std::exception_ptr error) noexcept;
  [[nodiscard]] bool has_failed() const;

  pid_t owner_process_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::size_t pending_;
  std::exception_ptr error_;
};

/// Owns its worker threads; close() or the destructor ends what is queued and joins them. submit()
/// and close() may be called from any thread.
///
/// Transfers are cut into pieces of kPieceNbytes that any worker takes, so one large transfer uses
/// them all. Pieces start in the order of submission and end in any order. The caller keeps the
/// memory alive until its ticket is done. Threads do not survive fork(): in the child every call is
/// refused, and the destructor leaks instead of hanging.
class IoPool {
 public:
  static constexpr std::size_t kPieceNbytes = std::size_t{1} << 20;
  static constexpr std::size_t kMaxThreads = 256;

  /// @throws ConfigError unless `num_threads` is 1 to kMaxThreads.
  explicit IoPool(std::size_t num_threads);
  IoPool(const IoPool&) = delete;
  IoPool& operator=(const IoPool&) = delete;
  IoPool(IoPool&&) = delete;
  IoPool& operator=(IoPool&&) = delete;
  ~IoPool();

  /// Queues reads of `file` into `buffer`; all ranges are checked before the first transfer starts.
  /// @throws ShapeError for a range outside the buffer, or not page aligned while the file is
  /// direct.
  [[nodiscard]] std::shared_ptr<Ticket> submit_read(std::shared_ptr<DirectFile> file,
                                                    Bytes buffer,
                                                    const std::vector<IoOp>& ops);

  /// Queues writes of `buffer` to `file`; see submit_read.
  [[nodiscard]] std::shared_ptr<Ticket> submit_write(std::shared_ptr<DirectFile> file,
                                                     ConstBytes buffer,
                                                     const std::vector<IoOp>& ops);

  /// Ends what is queued, joins the threads; later submits are refused. A second call does nothing.
  void close();

 private:
  struct Piece {
    std::shared_ptr<Ticket> ticket;
    std::shared_ptr<DirectFile> file;
    Direction direction;
    // Reads write through it; for writes it is only ever viewed as const.
    std::uint8_t* memory;
    std::size_t nbytes;
    std::uint64_t file_offset;
  };
  struct Queue {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Piece> pieces;
    bool is_closed = false;
  };

  [[nodiscard]] std::shared_ptr<Ticket> submit(Direction direction,
                                               std::shared_ptr<DirectFile> file,
                                               Bytes buffer,
                                               const std::vector<IoOp>& ops);
  static void work(Queue& queue);
  static void transfer(const Piece& piece);

  pid_t owner_process_;
  std::unique_ptr<Queue> queue_;
  std::mutex close_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace kv
