// SPDX-License-Identifier: Apache-2.0
// Runs the native tests without Python, so that sanitizers see every access.
#include <cstdio>

#include "check.hpp"

int main() {
  std::printf("%08x\n", test_index(test_codec()));
  test_io();
  return 0;
}
