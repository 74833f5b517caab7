// SPDX-License-Identifier: Apache-2.0
// The errors that native code throws, and one check macro per origin. Python sees each as the class
// of the same meaning in kvstore/errors.py.
#pragma once

#include <cerrno>
#include <stdexcept>
#include <string>

namespace kv {

/// Base of every error thrown on purpose; the message says what, wanted, got, and where in the
/// source.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A buffer, offset or geometry that does not fit: the caller's mistake.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// A setting that is out of range: the caller's mistake.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// Bytes that violate FORMAT.md or fail their checksum.
class CorruptRecord : public Error {
 public:
  using Error::Error;
};

/// Bytes in a newer format, or using a feature that this version does not know.
class UnsupportedFormat : public Error {
 public:
  using Error::Error;
};

/// The file system or a quota is full.
class CapacityError : public Error {
 public:
  using Error::Error;
};

/// The operating system or the CUDA runtime refused.
class IoError : public Error {
 public:
  IoError(const std::string& message, int error_number)
      : Error(message), error_number_(error_number) {}
  /// errno of the refused call; 0 when there is none (end of file, CUDA).
  [[nodiscard]] int error_number() const noexcept { return error_number_; }

 private:
  int error_number_;
};

/// `message (file:line)`, the directory of `file` left out.
[[nodiscard]] std::string located(const std::string& message, const char* file, int line);

/// Throws CapacityError for ENOSPC, EDQUOT and EFBIG, IoError for any other `error_number`.
[[noreturn]] void throw_errno(const std::string& message,
                              int error_number,
                              const char* file,
                              int line);

}  // namespace kv

/// Own precondition or format rule: throws `Type` unless `condition`; the message is built only on
/// failure.
#define KV_EXPECT(condition, Type, message)                     \
  do {                                                          \
    if (!(condition)) {                                         \
      throw Type(::kv::located((message), __FILE__, __LINE__)); \
    }                                                           \
  } while (false)

/// System call that returns a negative number and sets errno on failure.
#define KV_ERRNO(call, message)                                         \
  do {                                                                  \
    if ((call) < 0) {                                                   \
      const int kv_errno = errno; /* building the message may set it */ \
      ::kv::throw_errno((message), kv_errno, __FILE__, __LINE__);       \
    }                                                                   \
  } while (false)
