// SPDX-License-Identifier: Apache-2.0
// The choice of an engine, and the checks before anything is queued.
#include "io/io_pool.hpp"

#include <unistd.h>

#include <string>
#include <utility>

#include "core/geometry.hpp"
#include "io/thread_engine.hpp"
#include "io/uring_engine.hpp"

namespace kv {
namespace {

std::string text_of(const IoOp& op) {
  return std::to_string(op.nbytes) + " bytes at file offset " + std::to_string(op.file_offset) +
         ", buffer offset " + std::to_string(op.buffer_offset);
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

void check_writable(const DirectFile& file) {
  KV_EXPECT(file.is_writable(), ConfigError, file.path() + " was opened for reading only");
}

Bytes unconst(ConstBytes buffer) {
  return {const_cast<std::uint8_t*>(buffer.data()), buffer.size()};
}

std::unique_ptr<IoEngine> make_engine(const IoPool::Options& options) {
  if (options.engine != EngineKind::kThreads) {
    try {
      return std::make_unique<UringEngine>(options.depth);
    } catch (const IoError& error) {
      KV_EXPECT(!options.engine.has_value(), ConfigError,
                std::string("there is no io_uring here: ") + error.what());
    }
  }
  return std::make_unique<ThreadEngine>(options.num_threads);
}

}  // namespace

IoPool::IoPool(const Options& options) : owner_process_(::getpid()) {
  KV_EXPECT(options.num_threads >= 1 && options.num_threads <= kMaxThreads, ConfigError,
            "num_threads is " + std::to_string(options.num_threads) + "; it must be 1 to " +
                std::to_string(kMaxThreads));
  KV_EXPECT(options.depth >= 1 && options.depth <= kMaxDepth, ConfigError,
            "depth is " + std::to_string(options.depth) + "; it must be 1 to " +
                std::to_string(kMaxDepth));
  engine_ = make_engine(options);
}

IoPool::~IoPool() {
  if (::getpid() != owner_process_) {
    // After fork() the threads are not here, and a lock may be held by one of them for ever.
    static_cast<void>(engine_.release());
  }
}

std::shared_ptr<Ticket> IoPool::submit_read(std::shared_ptr<DirectFile> file,
                                            Bytes buffer,
                                            std::vector<IoOp> ops) {
  auto ticket = make_ticket(Direction::kRead, std::move(file), buffer, std::move(ops));
  engine_->submit(ticket);
  return ticket;
}

std::shared_ptr<Ticket> IoPool::submit_write(std::shared_ptr<DirectFile> file,
                                             ConstBytes buffer,
                                             std::vector<IoOp> ops) {
  check_writable(*file);
  auto ticket = make_ticket(Direction::kWrite, std::move(file), unconst(buffer), std::move(ops));
  engine_->submit(ticket);
  return ticket;
}

void IoPool::read(std::shared_ptr<DirectFile> file, Bytes buffer, std::vector<IoOp> ops) {
  move_and_wait(make_ticket(Direction::kRead, std::move(file), buffer, ops), ops);
}

void IoPool::write(std::shared_ptr<DirectFile> file, ConstBytes buffer, std::vector<IoOp> ops) {
  check_writable(*file);
  move_and_wait(make_ticket(Direction::kWrite, std::move(file), unconst(buffer), ops), ops);
}

void IoPool::move_and_wait(const std::shared_ptr<Ticket>& ticket, const std::vector<IoOp>& ops) {
  if (ops.size() == 1 && ops[0].nbytes <= kMaxOwnNbytes) {
    // Nobody else knows the ticket: what is taken of it need not be counted.
    if (std::optional<Piece> piece = ticket->take(kMaxOwnNbytes)) {
      piece->transfer();
    }
    return;
  }
  engine_->submit(ticket);
  ticket->wait();
}

std::shared_ptr<Ticket> IoPool::make_ticket(Direction direction,
                                            std::shared_ptr<DirectFile> file,
                                            Bytes buffer,
                                            std::vector<IoOp> ops) const {
  check_process(owner_process_);
  const bool is_direct = file->is_direct();
  for (const IoOp& op : ops) {
    check_op(op, buffer, is_direct);
  }
  return std::make_shared<Ticket>(direction, std::move(file), buffer, std::move(ops));
}

void IoPool::close() {
  check_process(owner_process_);
  engine_->close();
}

}  // namespace kv
