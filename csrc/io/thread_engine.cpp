// SPDX-License-Identifier: Apache-2.0
// The workers and their queue.
#include "io/thread_engine.hpp"

#include <cstdint>
#include <exception>
#include <utility>

#include "core/error.hpp"

namespace kv {

ThreadEngine::ThreadEngine(std::size_t num_threads) : queue_({num_threads, SIZE_MAX}) {
  threads_.reserve(num_threads + 1);
  try {
    for (std::size_t index = 0; index <= num_threads; ++index) {
      threads_.emplace_back([this] { work(); });
    }
  } catch (...) {
    close();  // joins the threads that did start; a joinable one must not be destroyed
    throw;
  }
}

ThreadEngine::~ThreadEngine() { close(); }

void ThreadEngine::submit(std::shared_ptr<Ticket> ticket) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    KV_EXPECT(!is_closed_, ConfigError, "this IoPool is closed");
    queue_.push(std::move(ticket));
  }
  changed_.notify_all();
}

void ThreadEngine::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closed_ = true;
  }
  changed_.notify_all();
  const std::lock_guard<std::mutex> lock(close_mutex_);
  for (std::thread& thread : threads_) {
    thread.join();
  }
  threads_.clear();
}

void ThreadEngine::work() {
  for (;;) {
    std::optional<TicketQueue::Taken> taken;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] {
        taken = queue_.take();
        return taken.has_value() || is_closed_;
      });
    }
    if (!taken.has_value()) {
      return;  // what waits for its share is taken by those who free it
    }
    std::exception_ptr error;
    try {
      taken->piece.transfer();
    } catch (...) {
      error = std::current_exception();
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.end(*taken);
    }
    changed_.notify_one();
    taken->ticket->finish(taken->piece.op, std::move(error));
  }
}

}  // namespace kv
