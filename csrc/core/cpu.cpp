// SPDX-License-Identifier: Apache-2.0
// Asks the CPU for its features.
#include "core/cpu.hpp"

namespace kv {

const CpuFeatures& cpu_features() noexcept {
  static const CpuFeatures features = [] {
    CpuFeatures found;
#ifdef KV_X86
    __builtin_cpu_init();
    found.has_crc32c = __builtin_cpu_supports("sse4.2") != 0;
    found.has_avx2 = __builtin_cpu_supports("avx2") != 0;
#endif
    return found;
  }();
  return features;
}

std::string cpu_feature_names() {
  const CpuFeatures& features = cpu_features();
  std::string names = features.has_crc32c ? "sse4.2" : "";
  if (features.has_avx2) {
    names += names.empty() ? "avx2" : ",avx2";
  }
  return names.empty() ? "baseline" : names;
}

}  // namespace kv
