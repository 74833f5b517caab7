// SPDX-License-Identifier: Apache-2.0
// The queue, its workers, and the checks before anything is queued.
#include "io/io_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "core/geometry.hpp"

namespace kv {
namespace {

std::string text_of(const IoOp& op) {
  return std::to_string(op.nbytes) + " bytes at file offset " + std::to_string(op.file_offset) +
         ", buffer offset " + std::to_string(op.buffer_offset);
}

// An inherited IoPool or Ticket waits for threads that are not there: refuse before any lock is
// touched.
void check_process(pid_t owner) {
  KV_EXPECT(::getpid() == owner, ConfigError,
            "this IoPool belongs to process " + std::to_string(owner) +
                "; its threads did not survive fork(): open a new one in this process");
}

void check_op(const IoOp& op, Bytes buffer, bool is_direct) {
  KV_EXPECT(fits(op.buffer_offset, op.nbytes, buffer.size()), ShapeError,
            text_of(op) + ": outside a buffer of " + std::to_string(buffer.size()) + " bytes");
  KV_EXPECT(fits(op.file_offset, op.nbytes, static_cast<std::uint64_t>(INT64_MAX)), ShapeError,
            text_of(op) + ": beyond the largest file");
  if (is_direct) {
    const auto address = reinterpret_cast<std::uintptr_t>(buffer.data() + op.buffer_offset);
    KV_EXPECT(
        (op.file_offset | op.nbytes | address) % kPageNbytes == 0, ShapeError,
        text_of(op) + ": direct I/O needs offset, length and memory address in multiples of 4096");
  }
}

}  // namespace

Ticket::Ticket(std::size_t num_pieces) : owner_process_(::getpid()), pending_(num_pieces) {}

bool Ticket::done() const {
  check_process(owner_process_);
  const std::lock_guard<std::mutex> lock(mutex_);
  return pending_ == 0;
}

void Ticket::wait() const {
  check_process(owner_process_);
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return pending_ == 0; });
  if (error_ != nullptr) {
    std::rethrow_exception(error_);
  }
}

void Ticket::finish_piece(std::exception_ptr error) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (error_ == nullptr) {
    error_ = std::move(error);
  }
  if (--pending_ == 0) {
    changed_.notify_all();
  }
}

bool Ticket::has_failed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_ != nullptr;
}

IoPool::IoPool(std::size_t num_threads)
    : owner_process_(::getpid()), queue_(std::make_unique<Queue>()) {
  KV_EXPECT(num_threads >= 1 && num_threads <= kMaxThreads, ConfigError,
            "num_threads is " + std::to_string(num_threads) + "; it must be 1 to " +
                std::to_string(kMaxThreads));
  threads_.reserve(num_threads);
  try {
    for (std::size_t index = 0; index < num_threads; ++index) {
      threads_.emplace_back([queue = queue_.get()] { work(*queue); });
    }
  } catch (...) {
    close();  // joins the threads that did start; a joinable one must not be destroyed
    throw;
  }
}

IoPool::~IoPool() {
  if (::getpid() == owner_process_) {
    close();
    return;
  }
  // After fork() the threads are not here, and the queue's lock may be held by one of them for
  // ever.
  for (std::thread& thread : threads_) {
    thread.detach();
  }
  static_cast<void>(queue_.release());
}

std::shared_ptr<Ticket> IoPool::submit_read(std::shared_ptr<DirectFile> file,
                                            Bytes buffer,
                                            const std::vector<IoOp>& ops) {
  return submit(Direction::kRead, std::move(file), buffer, ops);
}

std::shared_ptr<Ticket> IoPool::submit_write(std::shared_ptr<DirectFile> file,
                                             ConstBytes buffer,
                                             const std::vector<IoOp>& ops) {
  KV_EXPECT(file->is_writable(), ConfigError, file->path() + " was opened for reading only");
  return submit(Direction::kWrite, std::move(file),
                Bytes(const_cast<std::uint8_t*>(buffer.data()), buffer.size()), ops);
}

std::shared_ptr<Ticket> IoPool::submit(Direction direction,
                                       std::shared_ptr<DirectFile> file,
                                       Bytes buffer,
                                       const std::vector<IoOp>& ops) {
  check_process(owner_process_);
  const bool is_direct = file->is_direct();
  std::size_t num_pieces = 0;
  for (const IoOp& op : ops) {
    check_op(op, buffer, is_direct);
    num_pieces += static_cast<std::size_t>((op.nbytes + kPieceNbytes - 1) / kPieceNbytes);
  }
  auto ticket = std::make_shared<Ticket>(num_pieces);
  std::vector<Piece> pieces;
  pieces.reserve(num_pieces);
  for (const IoOp& op : ops) {
    for (std::uint64_t at = 0; at < op.nbytes; at += kPieceNbytes) {
      const std::size_t nbytes = std::min<std::size_t>(kPieceNbytes, op.nbytes - at);
      pieces.push_back(Piece{ticket, file, direction, buffer.data() + op.buffer_offset + at, nbytes,
                             op.file_offset + at});
    }
  }
  {
    const std::lock_guard<std::mutex> lock(queue_->mutex);
    KV_EXPECT(!queue_->is_closed, ConfigError, "this IoPool is closed");
    std::move(pieces.begin(), pieces.end(), std::back_inserter(queue_->pieces));
  }
  queue_->changed.notify_all();
  return ticket;
}

void IoPool::close() {
  check_process(owner_process_);
  {
    const std::lock_guard<std::mutex> lock(queue_->mutex);
    queue_->is_closed = true;
  }
  queue_->changed.notify_all();
  const std::lock_guard<std::mutex> lock(close_mutex_);
  for (std::thread& thread : threads_) {
    thread.join();
  }
  threads_.clear();
}

void IoPool::work(Queue& queue) {
  for (;;) {
    std::unique_lock<std::mutex> lock(queue.mutex);
    queue.changed.wait(lock, [&queue] { return queue.is_closed || !queue.pieces.empty(); });
    if (queue.pieces.empty()) {
      return;
    }
    const Piece piece = std::move(queue.pieces.front());
    queue.pieces.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      // The batch has failed as a whole already: its other pieces need not cost time.
      if (!piece.ticket->has_failed()) {
        transfer(piece);
      }
    } catch (...) {
      error = std::current_exception();
    }
    piece.ticket->finish_piece(std::move(error));
  }
}

void IoPool::transfer(const Piece& piece) {
  if (piece.direction == Direction::kRead) {
    piece.file->read_exactly(Bytes(piece.memory, piece.nbytes), piece.file_offset);
  } else {
    piece.file->write_exactly(ConstBytes(piece.memory, piece.nbytes), piece.file_offset);
  }
}

}  // namespace kv
