// SPDX-License-Identifier: Apache-2.0
// The ring's thread: begin, sleep, settle.
#include "io/uring_engine.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <utility>

#include "core/error.hpp"

namespace kv {
namespace {

constexpr std::uint64_t kWakeTag = UINT64_MAX;

}  // namespace

UringEngine::UringEngine(unsigned depth)
    : ring_(kNumShares * depth + 1),
      queue_({depth, kMaxNbytesInFlight}),
      slots_(kNumShares * depth) {
  for (std::size_t slot = slots_.size(); slot-- > 0;) {
    free_slots_.push_back(slot);
  }
  event_ = ::eventfd(0, EFD_CLOEXEC);
  KV_ERRNO(event_, "make an eventfd");
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    ::close(event_);
    throw;
  }
}

UringEngine::~UringEngine() {
  close();
  ::close(event_);
}

void UringEngine::submit(std::shared_ptr<Ticket> ticket) {
  bool is_asleep = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    KV_EXPECT(!is_closed_, ConfigError, "this IoPool is closed");
    queue_.push(std::move(ticket));
    is_asleep = std::exchange(is_asleep_, false);
  }
  if (is_asleep) {
    wake();
  }
}

void UringEngine::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closed_ = true;
    is_asleep_ = false;
  }
  const std::lock_guard<std::mutex> lock(close_mutex_);
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
}

void UringEngine::wake() noexcept {
  const std::uint64_t one = 1;
  while (::write(event_, &one, sizeof(one)) < 0 && errno == EINTR) {
  }
}

void UringEngine::work() {
  ring_.enable();
  while (begin_pieces()) {
    if (!is_wake_armed_) {
      ring_.prepare_wake(event_, &event_value_, kWakeTag);
      is_wake_armed_ = true;
    }
    // One call for several ends, and for as many new beginnings; an eighth of what is in flight is
    // not missed by the device. One that ends nothing in that time is slow or stalls: wait for one
    // end then, as long as it takes.
    const std::size_t num_in_flight = slots_.size() - free_slots_.size();
    ring_.enter(is_idle_ ? 1 : std::max(1U, static_cast<unsigned>(num_in_flight / 8)));
    Uring::Completion completion{};
    is_idle_ = true;
    while (ring_.take(completion)) {
      is_idle_ = false;
      if (completion.tag == kWakeTag) {
        is_wake_armed_ = false;
      } else {
        settle(static_cast<std::size_t>(completion.tag), completion.result);
      }
    }
  }
}

bool UringEngine::begin_pieces() {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_asleep_ = false;
  while (!free_slots_.empty()) {
    std::optional<TicketQueue::Taken> taken = queue_.take();
    if (!taken.has_value()) {
      // All has begun, or waits for its share: a new ticket has to wake this thread.
      is_asleep_ = true;
      return !is_closed_ || free_slots_.size() < slots_.size();
    }
    const std::size_t slot = free_slots_.back();
    free_slots_.pop_back();
    slots_[slot] = std::move(taken);
    ring_.prepare(slots_[slot]->piece, slot);
  }
  return true;
}

void UringEngine::settle(std::size_t slot, std::int64_t result) {
  TicketQueue::Taken& taken = *slots_[slot];
  std::exception_ptr error;
  try {
    if (result == -EAGAIN) {  // the kernel would have to block: let it block here, which is rare
      taken.piece.transfer();
    } else if (!taken.piece.settle(result)) {
      ring_.prepare(taken.piece, slot);
      return;
    }
  } catch (...) {
    error = std::current_exception();
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.end(taken);
  }
  const std::size_t op = taken.piece.op;
  const std::shared_ptr<Ticket> ticket = std::move(taken.ticket);
  slots_[slot].reset();  // lets go of the file before anybody hears that the transfer has ended
  free_slots_.push_back(slot);
  ticket->finish(op, std::move(error));
}

}  // namespace kv
