// SPDX-License-Identifier: Apache-2.0
// The answers of a build without CUDA: no devices, and a refusal to move device memory.
#include "core/device.hpp"

#ifndef KV_WITH_CUDA

namespace kv::device {
namespace {

[[noreturn]] void refuse(int line) {
  throw ConfigError(
      located("kvstore was built without CUDA: build with KVSTORE_CUDA=on to move device memory",
              __FILE__, line));
}

}  // namespace

bool is_built() noexcept { return false; }
int count() noexcept { return 0; }
void pin(Bytes) { refuse(__LINE__); }
void unpin(Bytes) noexcept {}

void copy_to_device(ConstBytes, DeviceBytes, const std::vector<CopyRun>&, CopyMethod, Stream) {
  refuse(__LINE__);
}
void copy_to_host(DeviceBytes, Bytes, const std::vector<CopyRun>&, CopyMethod, Stream) {
  refuse(__LINE__);
}
void move_paged_rows(PagedMove, const PagedPlane&, const PagedArrays&, Stream) { refuse(__LINE__); }

}  // namespace kv::device

#endif  // KV_WITH_CUDA
