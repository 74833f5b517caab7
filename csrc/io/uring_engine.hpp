// SPDX-License-Identifier: Apache-2.0
// Moves pieces through one io_uring: many transfers in flight, one thread, few system calls.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "io/engine.hpp"
#include "io/uring.hpp"

namespace kv {

/// One thread owns the ring: it begins pieces while there is room, sleeps in the kernel until one
/// ends or `submit` wakes it, and tells the tickets.
class UringEngine final : public IoEngine {
 public:
  /// More bytes in flight only make the first ones wait, and with them who works on them as they
  /// come: this is what drives of 28 GB/s move in 150 microseconds. Writes count a quarter.
  static constexpr std::size_t kMaxNbytesInFlight = std::size_t{4} << 20;

  /// Lanes that can have all in flight that they may at once, such as both directions of two
  /// drives; more share the room.
  static constexpr unsigned kNumShares = 4;

  /// @param depth  most pieces in flight of one lane.
  /// @throws IoError when there is no io_uring to be had; see Uring.
  explicit UringEngine(unsigned depth);
  UringEngine(const UringEngine&) = delete;
  UringEngine& operator=(const UringEngine&) = delete;
  UringEngine(UringEngine&&) = delete;
  UringEngine& operator=(UringEngine&&) = delete;
  ~UringEngine() override;

  [[nodiscard]] const char* name() const noexcept override { return "io_uring"; }
  void submit(std::shared_ptr<Ticket> ticket) override;
  void close() override;

 private:
  void work();
  // Begins pieces while there is room. Returns false when the engine is closed and has ended all.
  [[nodiscard]] bool begin_pieces();
  void settle(std::size_t slot, std::int64_t result);
  void wake() noexcept;

  Uring ring_;
  int event_ = -1;
  std::uint64_t event_value_ = 0;  // where the ring reads the event to

  std::mutex mutex_;
  TicketQueue queue_;
  bool is_closed_ = false;
  bool is_asleep_ = false;  // in the kernel, and would not see a new ticket without a wake

  // The thread's own.
  std::vector<std::optional<TicketQueue::Taken>> slots_;
  std::vector<std::size_t> free_slots_;
  bool is_wake_armed_ = false;
  bool is_idle_ = false;  // the last wait ended by its time

  std::mutex close_mutex_;
  std::thread thread_;
};

}  // namespace kv
