// SPDX-License-Identifier: Apache-2.0
// Opening, growing, syncing and closing one file.
#include "io/direct_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace kv {
namespace {

constexpr mode_t kMode = 0644;

int open_retrying(const std::string& path, int flags) {
  int descriptor = -1;
  do {
    descriptor = ::open(path.c_str(), flags, kMode);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

}  // namespace

DirectFile::DirectFile(const std::string& path, bool writable)
    : path_(path), is_writable_(writable) {
  const int flags = O_CLOEXEC | (writable ? O_RDWR | O_CREAT : O_RDONLY);
  descriptor_ = open_retrying(path_, flags | O_DIRECT);
  is_direct_ = descriptor_ >= 0;
  if (descriptor_ < 0 && errno == EINVAL) {
    descriptor_ = open_retrying(path_, flags);
  }
  KV_ERRNO(descriptor_, about("open"));
  struct stat status{};
  if (::fstat(descriptor_, &status) ==
      0) {  // else a device of its own: it only says who takes turns
    device_ = status.st_dev;
  }
}

DirectFile::~DirectFile() { ::close(descriptor_); }

std::string DirectFile::about(const char* verb) const { return std::string(verb) + " " + path_; }

std::uint64_t DirectFile::size() const {
  struct stat status{};
  KV_ERRNO(::fstat(descriptor_, &status), about("stat"));
  return static_cast<std::uint64_t>(status.st_size);
}

void DirectFile::preallocate(std::uint64_t nbytes) {
  const std::uint64_t before = size();
  if (nbytes <= before) {
    return;
  }
  KV_EXPECT(nbytes <= static_cast<std::uint64_t>(INT64_MAX), ShapeError,
            "a file of " + std::to_string(nbytes) + " bytes is beyond the limit of 2^63 - 1");
  int error_number = EINTR;
  while (error_number == EINTR) {
    error_number = ::posix_fallocate(descriptor_, 0, static_cast<off_t>(nbytes));
  }
  if (error_number == 0) {
    return;
  }
  // A refused request may have grown the file part of the way: give that space back, keep the first
  // error.
  if (size() > before) {
    KV_ERRNO(::ftruncate(descriptor_, static_cast<off_t>(before)), about("shrink"));
  }
  throw_errno(about("preallocate") + " to " + std::to_string(nbytes) + " bytes", error_number,
              __FILE__, __LINE__);
}

void DirectFile::sync() { KV_ERRNO(::fdatasync(descriptor_), about("sync")); }

void DirectFile::drop_cache() {
  const int error_number = ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
  if (error_number != 0) {
    throw_errno(about("drop cache of"), error_number, __FILE__, __LINE__);
  }
}

void DirectFile::leave_direct_mode() {
  const int flags = ::fcntl(descriptor_, F_GETFL);
  KV_ERRNO(flags, about("ask for the flags of"));
  KV_ERRNO(::fcntl(descriptor_, F_SETFL, flags & ~O_DIRECT), about("leave direct mode of"));
  is_direct_ = false;  // last: who finds it false must not meet a descriptor that still is
}

}  // namespace kv
