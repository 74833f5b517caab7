// SPDX-License-Identifier: Apache-2.0
// What the native tests assert with: also in release builds, and with the place of the failure.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

#define CHECK_THROWS(expression, Type) \
  do {                                 \
    bool was_thrown = false;           \
    try {                              \
      static_cast<void>(expression);   \
    } catch (const Type&) {            \
      was_thrown = true;               \
    }                                  \
    CHECK(was_thrown && #Type);        \
  } while (false)

/// Returns a checksum of all bytes made, which must not depend on the machine.
unsigned test_codec();
/// The same for the index, continued from `seed`.
unsigned test_index(unsigned seed);
void test_io();
