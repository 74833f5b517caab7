// SPDX-License-Identifier: Apache-2.0
// What moves the pieces of tickets: system calls on several threads, or one io_uring.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <deque>
#include <list>
#include <memory>
#include <optional>

#include "io/ticket.hpp"

namespace kv {

/// Tickets in lanes, one a device and direction: lanes take turns, and none has more in flight than
/// its share, so that reads pass queued writes, and a device that stalls holds up no other. In a
/// lane, pieces are taken from the first ticket that has any left. The lock is the engine's, so
/// that it can decide under it whether to sleep.
class TicketQueue {
 public:
  /// Most in flight of one lane; another piece begins while there is less than either.
  struct Share {
    std::size_t num_pieces;
    std::size_t nbytes;
  };

  struct Lane {
    dev_t device;
    Direction direction;
    std::deque<std::shared_ptr<Ticket>> tickets;
    std::size_t num_pieces = 0;
    std::size_t nbytes = 0;
  };

  struct Taken {
    std::shared_ptr<Ticket> ticket;
    Piece piece;
    std::list<Lane>::iterator lane;
  };

  explicit TicketQueue(Share share) : share_(share) {}

  void push(std::shared_ptr<Ticket> ticket);

  /// The next piece to begin; none when all has begun that the shares allow.
  [[nodiscard]] std::optional<Taken> take();

  /// Says that a piece has ended, and its share is free.
  void end(const Taken& taken) noexcept;

 private:
  const Share share_;
  std::list<Lane> lanes_;  // whose turn it is first
};

/// Ends every ticket that was submitted, however it is closed. Thread-safe.
class IoEngine {
 public:
  IoEngine() = default;
  IoEngine(const IoEngine&) = delete;
  IoEngine& operator=(const IoEngine&) = delete;
  IoEngine(IoEngine&&) = delete;
  IoEngine& operator=(IoEngine&&) = delete;
  virtual ~IoEngine() = default;

  [[nodiscard]] virtual const char* name() const noexcept = 0;

  /// @throws ConfigError when closed.
  virtual void submit(std::shared_ptr<Ticket> ticket) = 0;

  /// Ends what was submitted, joins the threads. A second call does nothing.
  virtual void close() = 0;
};

}  // namespace kv
