// SPDX-License-Identifier: Apache-2.0
// mbind(2) by system call: libnuma is not everywhere.
#include "io/memory_nodes.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <fstream>
#include <system_error>
#include <thread>

#include "core/geometry.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kv {
namespace {

constexpr unsigned kInterleave = 3;  // MPOL_INTERLEAVE
constexpr unsigned kMaxNodes = 1024;
constexpr std::size_t kLeastNbytes = std::size_t{64} << 20;  // a thread's worth

// Reads digits from `at` on; kMaxNodes and more count as none.
bool read_number(const std::string& text, std::size_t& at, unsigned& number) {
  const std::size_t first = at;
  for (number = 0; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at) {
    number = number * 10 + static_cast<unsigned>(text[at] - '0');
    if (number >= kMaxNodes) {
      return false;
    }
  }
  return at > first;
}

void touch_part(Bytes part) {
  if (::madvise(part.data(), part.size(), MADV_POPULATE_WRITE) == 0) {
    return;
  }
  for (std::size_t at = 0; at < part.size(); at += kPageNbytes) {  // before Linux 5.14
    static_cast<volatile std::uint8_t*>(part.data())[at] = 0;
  }
}

}  // namespace

std::vector<unsigned> parse_nodes(const std::string& list) {
  std::vector<unsigned> nodes;
  std::size_t at = 0;
  for (;;) {
    unsigned first = 0;
    if (!read_number(list, at, first)) {
      return {};
    }
    unsigned last = first;
    if (at < list.size() && list[at] == '-' && (!read_number(list, ++at, last) || last < first)) {
      return {};
    }
    for (unsigned node = first; node <= last; ++node) {
      nodes.push_back(node);
    }
    if (at == list.size()) {
      return nodes;
    }
    if (list[at++] != ',') {
      return {};
    }
  }
}

void interleave(Bytes memory) noexcept {
  try {
    std::ifstream file("/sys/devices/system/node/has_memory");
    std::string list;
    std::getline(file, list);
    const std::vector<unsigned> nodes = parse_nodes(list);
    if (nodes.size() < 2) {
      return;
    }
    constexpr unsigned kWordBits = CHAR_BIT * sizeof(unsigned long);
    std::vector<unsigned long> mask(kMaxNodes / kWordBits);
    for (const unsigned node : nodes) {
      mask[node / kWordBits] |= 1UL << (node % kWordBits);
    }
    static_cast<void>(::syscall(__NR_mbind, memory.data(), memory.size(), kInterleave, mask.data(),
                                kMaxNodes, 0));
  } catch (...) {  // out of memory for a list of nodes: advice that was not given
    return;
  }
}

void touch(Bytes memory, std::size_t num_threads) {
  const std::size_t useful = std::max<std::size_t>(1, memory.size() / kLeastNbytes);
  const std::size_t count = std::max<std::size_t>(1, std::min(num_threads, useful));
  const auto step = static_cast<std::size_t>(round_up(memory.size() / count + 1, kPageNbytes));
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (std::size_t start = step; start < memory.size(); start += step) {
    const Bytes part(memory.data() + start, std::min(step, memory.size() - start));
    try {
      threads.emplace_back([part] { touch_part(part); });
    } catch (const std::system_error&) {  // no more threads to be had: they only save time
      touch_part(part);
    }
  }
  touch_part(Bytes(memory.data(), std::min(step, memory.size())));
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace kv
