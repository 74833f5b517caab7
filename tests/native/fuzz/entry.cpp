// SPDX-License-Identifier: Apache-2.0
// libFuzzer's entry; the build names the target: -DKV_FUZZ_TARGET=decode.
#include "fuzz/targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kv::fuzz::KV_FUZZ_TARGET(kv::ConstBytes{data, size});
  return 0;
}
