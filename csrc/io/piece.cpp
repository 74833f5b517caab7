// SPDX-License-Identifier: Apache-2.0
// Short counts, ends of files, refusals of O_DIRECT and errors, told apart in one place.
#include "io/piece.hpp"

#include <unistd.h>

#include <cerrno>
#include <string>

namespace kv {
namespace {

std::string about(const Piece& piece) {
  return std::string(piece.direction == Direction::kRead ? "read " : "write ") +
         piece.file->path() + " of " + std::to_string(piece.nbytes) + " bytes at " +
         std::to_string(piece.file_offset);
}

}  // namespace

bool Piece::settle(std::int64_t result) {
  if (result > 0) {
    done += static_cast<std::size_t>(result);
    return done >= nbytes;
  }
  if (result == 0 && direction == Direction::kRead) {
    throw IoError(located(about(*this) + ": end of file after " + std::to_string(done) + " bytes",
                          __FILE__, __LINE__),
                  0);
  }
  const int error_number = result == 0 ? EIO : static_cast<int>(-result);
  if (error_number == EINVAL && may_fall_back) {
    may_fall_back = false;
    file->leave_direct_mode();
  } else if (error_number != EINTR) {
    throw_errno(about(*this), error_number, __FILE__, __LINE__);
  }
  return false;
}

void Piece::transfer() {
  bool is_complete = nbytes == 0;
  while (!is_complete) {
    const int descriptor = file->descriptor();
    const auto offset = static_cast<off_t>(rest_offset());
    const ssize_t count = direction == Direction::kRead
                              ? ::pread(descriptor, rest(), rest_nbytes(), offset)
                              : ::pwrite(descriptor, rest(), rest_nbytes(), offset);
    is_complete = settle(count < 0 ? -static_cast<std::int64_t>(errno) : count);
  }
}

}  // namespace kv
