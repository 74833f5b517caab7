// SPDX-License-Identifier: Apache-2.0
// Maps, advises, pins and gives back memory.
#include "io/arena.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>

#include "core/device.hpp"
#include "core/geometry.hpp"
#include "io/memory_nodes.hpp"

namespace kv {
namespace {

constexpr std::size_t kHugePageNbytes = std::size_t{2} << 20;
// What is registered with a device at once: larger ranges are refused by some systems.
constexpr std::size_t kMaxPinNbytes = std::size_t{64} << 30;
constexpr std::size_t kTouchThreads = 16;

void unmap(std::uint8_t* memory, std::size_t nbytes) {
  if (nbytes > 0) {
    ::munmap(memory, nbytes);
  }
}

Bytes map_pages(std::size_t nbytes) {
  KV_EXPECT(nbytes >= 1 && nbytes <= std::size_t{1} << 48, ShapeError,
            "an arena of " + std::to_string(nbytes) + " bytes; it must be 1 to 2^48");
  const auto rounded = static_cast<std::size_t>(round_up(nbytes, kPageNbytes));
  // Huge pages begin at multiples of their size; what the mapping has too much is cut off again.
  const std::size_t spare = rounded >= kHugePageNbytes ? kHugePageNbytes : 0;
  void* mapped =
      ::mmap(nullptr, rounded + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  KV_EXPECT(mapped != MAP_FAILED, CapacityError,
            "no memory for an arena of " + std::to_string(rounded) + " bytes");
  auto* memory = static_cast<std::uint8_t*>(mapped);
  if (spare > 0) {
    const std::size_t skipped =
        (kHugePageNbytes - reinterpret_cast<std::uintptr_t>(memory) % kHugePageNbytes) %
        kHugePageNbytes;
    unmap(memory, skipped);
    memory += skipped;
    unmap(memory + rounded, spare - skipped);
  }
  // Advice only: kernels without huge pages refuse it, and small pages work too.
  static_cast<void>(::madvise(memory, rounded, MADV_HUGEPAGE));
  return Bytes(memory, rounded);
}

}  // namespace

Arena::Arena(std::size_t nbytes, bool pinned) : bytes_(map_pages(nbytes)) {
  if (!pinned || device::count() == 0) {
    return;
  }
  try {
    interleave(bytes_);
    touch(bytes_, std::min<std::size_t>(kTouchThreads, std::thread::hardware_concurrency()));
    while (pinned_nbytes_ < bytes_.size()) {
      const Bytes part = part_at(pinned_nbytes_);
      device::pin(part);
      pinned_nbytes_ += part.size();
    }
  } catch (...) {
    unpin();
    ::munmap(bytes_.data(), bytes_.size());
    throw;
  }
}

Bytes Arena::part_at(std::size_t offset) const noexcept {
  return Bytes(bytes_.data() + offset, std::min(kMaxPinNbytes, bytes_.size() - offset));
}

void Arena::unpin() noexcept {
  for (std::size_t offset = 0; offset < pinned_nbytes_; offset += kMaxPinNbytes) {
    device::unpin(part_at(offset));
  }
  pinned_nbytes_ = 0;
}

Arena::~Arena() {
  unpin();
  ::munmap(bytes_.data(), bytes_.size());
}

}  // namespace kv
