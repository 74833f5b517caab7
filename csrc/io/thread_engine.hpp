// SPDX-License-Identifier: Apache-2.0
// Moves pieces by blocking system calls on threads of its own: works everywhere.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/engine.hpp"

namespace kv {

/// One thread more than a lane may keep busy: others get on while its device stalls.
class ThreadEngine final : public IoEngine {
 public:
  /// @param num_threads  most transfers in flight of one lane.
  explicit ThreadEngine(std::size_t num_threads);
  ThreadEngine(const ThreadEngine&) = delete;
  ThreadEngine& operator=(const ThreadEngine&) = delete;
  ThreadEngine(ThreadEngine&&) = delete;
  ThreadEngine& operator=(ThreadEngine&&) = delete;
  ~ThreadEngine() override;

  [[nodiscard]] const char* name() const noexcept override { return "threads"; }
  void submit(std::shared_ptr<Ticket> ticket) override;
  void close() override;

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  TicketQueue queue_;
  bool is_closed_ = false;
  std::mutex close_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace kv
