// SPDX-License-Identifier: Apache-2.0
// The way to an engine: checks what is submitted, picks the engine, refuses a forked child.
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <vector>

#include "core/span.hpp"
#include "io/direct_file.hpp"
#include "io/engine.hpp"
#include "io/ticket.hpp"

namespace kv {

enum class EngineKind { kThreads, kUring };

/// Moves batches of bytes between files and memory; close() or the destructor ends what is
/// submitted. All methods may be called from any thread.
///
/// Reads of a device start in the order of submission, and so do writes; they end in any order. The
/// caller keeps the memory alive until its ticket is done. Threads do not survive fork(): in the
/// child every call is refused, and the destructor leaks instead of hanging.
class IoPool {
 public:
  static constexpr std::size_t kMaxThreads = 256;
  static constexpr unsigned kMaxDepth = 1024;
  /// A longer transfer gains from being cut into pieces that are in flight together.
  static constexpr std::size_t kMaxOwnNbytes = std::size_t{4} << 20;

  struct Options {
    std::size_t num_threads;           ///< of the engine `kThreads`: its transfers in flight
    std::optional<EngineKind> engine;  ///< none: io_uring where it is to be had, else threads
    unsigned depth = 64;  ///< of the engine `kUring`: most pieces in flight, a device and direction
  };

  /// @throws ConfigError for a number out of range, or when the engine asked for cannot be had.
  explicit IoPool(const Options& options);
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
                                                    std::vector<IoOp> ops);

  /// Queues writes of `buffer` to `file`; see submit_read.
  [[nodiscard]] std::shared_ptr<Ticket> submit_write(std::shared_ptr<DirectFile> file,
                                                     ConstBytes buffer,
                                                     std::vector<IoOp> ops);

  /// Like submit_read, and waits. A single transfer of up to kMaxOwnNbytes is made on the calling
  /// thread: waking another one takes as long as the device.
  void read(std::shared_ptr<DirectFile> file, Bytes buffer, std::vector<IoOp> ops);

  /// Like submit_write, and waits; see read.
  void write(std::shared_ptr<DirectFile> file, ConstBytes buffer, std::vector<IoOp> ops);

  /// Ends what is queued, joins the threads; later submits are refused. A second call does nothing.
  void close();

  [[nodiscard]] const char* engine() const noexcept { return engine_->name(); }

 private:
  [[nodiscard]] std::shared_ptr<Ticket> make_ticket(Direction direction,
                                                    std::shared_ptr<DirectFile> file,
                                                    Bytes buffer,
                                                    std::vector<IoOp> ops) const;
  void move_and_wait(const std::shared_ptr<Ticket>& ticket, const std::vector<IoOp>& ops);

  pid_t owner_process_;
  std::unique_ptr<IoEngine> engine_;
};

}  // namespace kv
