// SPDX-License-Identifier: Apache-2.0
// Memory that ends where a page begins which nobody may touch: gathers and masked stores, which
// the compiler's address checker does not see, fault there like everything else.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fuzz/targets.hpp"

namespace kv::fuzz {

/// Room for one buffer at a time.
class Guarded {
 public:
  Guarded() {
    void* mapped = mmap(nullptr, kCapacity + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(mapped != MAP_FAILED, "there is memory");
    end_ = static_cast<std::uint8_t*>(mapped) + kCapacity;
    expect(mprotect(end_, kPage, PROT_NONE) == 0, "a page can be protected");
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(end_ - kCapacity, kCapacity + kPage); }

  /// The last `nbytes` before the page, filled with `value`; whatever was there is lost.
  [[nodiscard]] Bytes room(std::size_t nbytes, std::uint8_t value) {
    expect(nbytes <= kCapacity, "samples are small");
    std::memset(end_ - nbytes, value, nbytes);
    return Bytes{end_ - nbytes, nbytes};
  }

  [[nodiscard]] ConstBytes copy(const Buffer& buffer) {
    const Bytes place = room(buffer.size(), 0);
    std::copy(buffer.begin(), buffer.end(), place.data());
    return ConstBytes{place.data(), place.size()};
  }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kCapacity = std::size_t{8} << 20U;

  std::uint8_t* end_;
};

}  // namespace kv::fuzz
