// SPDX-License-Identifier: Apache-2.0
// Maps, advises, pins and gives back memory.
#include "io/arena.hpp"

#include <sys/mman.h>

#include <string>

#include "core/device.hpp"
#include "core/geometry.hpp"

namespace kv {
namespace {

Bytes map_pages(std::size_t nbytes) {
  KV_EXPECT(nbytes >= 1 && nbytes <= std::size_t{1} << 48, ShapeError,
            "an arena of " + std::to_string(nbytes) + " bytes; it must be 1 to 2^48");
  const auto rounded = static_cast<std::size_t>(round_up(nbytes, kPageNbytes));
  void* memory =
      ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  KV_EXPECT(memory != MAP_FAILED, CapacityError,
            "no memory for an arena of " + std::to_string(rounded) + " bytes");
  // Advice only: kernels without huge pages refuse it, and small pages work too.
  static_cast<void>(::madvise(memory, rounded, MADV_HUGEPAGE));
  return Bytes(static_cast<std::uint8_t*>(memory), rounded);
}

}  // namespace

Arena::Arena(std::size_t nbytes, bool pinned) : bytes_(map_pages(nbytes)) {
  if (!pinned || device::count() == 0) {
    return;
  }
  try {
    device::pin(bytes_);
  } catch (...) {
    ::munmap(bytes_.data(), bytes_.size());
    throw;
  }
  is_pinned_ = true;
}

void Arena::close() noexcept {
  if (is_closed_) {
    return;
  }
  if (is_pinned_) {
    device::unpin(bytes_);
    is_pinned_ = false;
  }
  static_cast<void>(::madvise(bytes_.data(), bytes_.size(), MADV_DONTNEED));
  is_closed_ = true;
}

Arena::~Arena() {
  close();
  ::munmap(bytes_.data(), bytes_.size());
}

}  // namespace kv
