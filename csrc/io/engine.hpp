// SPDX-License-Identifier: Apache-2.0
// What moves the pieces of tickets: system calls on several threads, or one io_uring.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "io/ticket.hpp"

namespace kv {

/// Tickets in the order of submission; pieces are taken from the first that has any left. The lock
/// is the engine's, so that it can decide under it whether to sleep.
class TicketQueue {
 public:
  struct Taken {
    std::shared_ptr<Ticket> ticket;
    Piece piece;
  };

  void push(std::shared_ptr<Ticket> ticket) { tickets_.push_back(std::move(ticket)); }

  /// The next piece to begin; none when all that was pushed has begun.
  [[nodiscard]] std::optional<Taken> take() {
    while (!tickets_.empty()) {
      if (std::optional<Piece> piece = tickets_.front()->take()) {
        return Taken{tickets_.front(), std::move(*piece)};
      }
      tickets_.pop_front();
    }
    return std::nullopt;
  }

 private:
  std::deque<std::shared_ptr<Ticket>> tickets_;
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
