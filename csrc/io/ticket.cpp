// SPDX-License-Identifier: Apache-2.0
// Cuts transfers into pieces as they are taken, and counts their ends.
#include "io/ticket.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

namespace kv {
namespace {

std::size_t num_pieces(const IoOp& op) {
  return static_cast<std::size_t>((op.nbytes + Ticket::kPieceNbytes - 1) / Ticket::kPieceNbytes);
}

}  // namespace

void check_process(pid_t owner) {
  KV_EXPECT(::getpid() == owner, ConfigError,
            "this IoPool belongs to process " + std::to_string(owner) +
                "; its threads did not survive fork(): open a new one in this process");
}

Ticket::Ticket(Direction direction,
               std::shared_ptr<DirectFile> file,
               Bytes buffer,
               std::vector<IoOp> ops)
    : owner_process_(::getpid()),
      direction_(direction),
      file_(std::move(file)),
      buffer_(buffer),
      ops_(std::move(ops)),
      num_pending_ops_(ops_.size()) {
  pending_.reserve(ops_.size());
  // Room for all: the thread that ends a transfer must not fail for want of memory.
  ended_.reserve(ops_.size());
  for (const IoOp& op : ops_) {
    pending_.push_back(num_pieces(op));
    if (op.nbytes == 0) {
      ended_.push_back(pending_.size() - 1);
      --num_pending_ops_;
    }
  }
}

bool Ticket::done() const {
  check_process(owner_process_);
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_pending_ops_ == 0;
}

bool Ticket::wait_until(std::optional<Clock::time_point> deadline) const {
  check_process(owner_process_);
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_done = [this] { return num_pending_ops_ == 0; };
  if (!deadline.has_value()) {
    all_ended_.wait(lock, is_done);
  } else if (!all_ended_.wait_until(lock, *deadline, is_done)) {
    return false;
  }
  if (!errors_.empty()) {
    std::rethrow_exception(errors_.begin()->second);
  }
  return true;
}

std::vector<std::size_t> Ticket::wait_some(bool may_wait) {
  check_process(owner_process_);
  std::unique_lock<std::mutex> lock(mutex_);
  some_ended_.wait(
      lock, [&] { return !may_wait || num_reported_ < ended_.size() || num_pending_ops_ == 0; });
  const auto first = ended_.begin() + static_cast<std::ptrdiff_t>(num_reported_);
  num_reported_ = ended_.size();
  return {first, ended_.end()};
}

std::map<std::size_t, std::exception_ptr> Ticket::errors() const {
  check_process(owner_process_);
  const std::lock_guard<std::mutex> lock(mutex_);
  return errors_;
}

void Ticket::cancel() {
  check_process(owner_process_);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (next_op_ == ops_.size()) {
    return;
  }
  const auto error = std::make_exception_ptr(IoError(
      located("a transfer of " + file_->path() + " was cancelled", __FILE__, __LINE__), ECANCELED));
  while (next_op_ < ops_.size()) {
    const std::uint64_t left = ops_[next_op_].nbytes - next_at_;
    if (left > 0) {
      end_pieces(next_op_, num_pieces(IoOp{0, 0, left}), error);
    }
    ++next_op_;
    next_at_ = 0;
  }
}

std::optional<Piece> Ticket::take(std::size_t most_nbytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (next_op_ < ops_.size()) {
    const IoOp& op = ops_[next_op_];
    const std::uint64_t left = op.nbytes - next_at_;
    if (left == 0) {
      ++next_op_;
      next_at_ = 0;
      continue;
    }
    // Its other pieces need not cost time: the transfer has failed as a whole.
    if (next_at_ > 0 && errors_.count(next_op_) != 0) {
      next_at_ = op.nbytes;
      end_pieces(next_op_, num_pieces(IoOp{0, 0, left}), nullptr);
      continue;
    }
    Piece piece;
    piece.file = file_;
    piece.direction = direction_;
    piece.memory = buffer_.data() + op.buffer_offset + next_at_;
    piece.nbytes = std::min<std::size_t>(most_nbytes, left);
    piece.file_offset = op.file_offset + next_at_;
    piece.op = next_op_;
    piece.may_fall_back = file_->is_direct();
    next_at_ += piece.nbytes;
    return piece;
  }
  return std::nullopt;
}

void Ticket::finish(std::size_t op, std::exception_ptr error) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  end_pieces(op, 1, std::move(error));
}

void Ticket::end_pieces(std::size_t op, std::size_t count, std::exception_ptr error) {
  if (error != nullptr) {
    errors_.emplace(op, std::move(error));  // the first error of a transfer stays
  }
  pending_[op] -= count;
  if (pending_[op] == 0) {
    ended_.push_back(op);
    --num_pending_ops_;
    some_ended_.notify_all();
    if (num_pending_ops_ == 0) {
      all_ended_.notify_all();
    }
  }
}

}  // namespace kv
