// SPDX-License-Identifier: Apache-2.0
// Formats messages; decides which errno means that the medium is full.
#include "core/error.hpp"

#include <cerrno>
#include <cstring>
#include <system_error>

namespace kv {

std::string located(const std::string& message, const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  const char* name = slash != nullptr ? slash + 1 : file;
  return message + " (" + name + ":" + std::to_string(line) + ")";
}

void throw_errno(const std::string& message, int error_number, const char* file, int line) {
  const std::string text =
      located(message + ": " + std::generic_category().message(error_number), file, line);
  if (error_number == ENOSPC || error_number == EDQUOT || error_number == EFBIG) {
    throw CapacityError(text);
  }
  throw IoError(text, error_number);
}

}  // namespace kv
