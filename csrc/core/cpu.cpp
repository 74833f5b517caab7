// SPDX-License-Identifier: Apache-2.0
// Asks the CPU for its features.
#include "core/cpu.hpp"

#include <algorithm>
#include <atomic>

namespace kv {
namespace {

std::atomic<SimdLevel> highest_level{SimdLevel::kAvx512};

#ifdef KV_X86
SimdLevel detected_level() noexcept {
  const bool has_avx2 = __builtin_cpu_supports("avx2") != 0 &&
                        __builtin_cpu_supports("bmi2") != 0 &&
                        __builtin_cpu_supports("popcnt") != 0;
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
      __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
      __builtin_cpu_supports("avx512vbmi") != 0 && __builtin_cpu_supports("avx512vbmi2") != 0;
  if (!has_avx2) {
    return SimdLevel::kBaseline;
  }
  return has_avx512 ? SimdLevel::kAvx512 : SimdLevel::kAvx2;
}
#endif

}  // namespace

const CpuFeatures& cpu_features() noexcept {
  static const CpuFeatures features = [] {
    CpuFeatures found;
#ifdef KV_X86
    __builtin_cpu_init();
    found.has_crc32c = __builtin_cpu_supports("sse4.2") != 0;
    found.has_vector_clmul = __builtin_cpu_supports("vpclmulqdq") != 0 &&
                             __builtin_cpu_supports("avx512f") != 0 &&
                             __builtin_cpu_supports("avx512dq") != 0;
    found.has_vnni = __builtin_cpu_supports("avx512vnni") != 0;
    found.simd_level = detected_level();
#endif
    return found;
  }();
  return features;
}

SimdLevel simd_level() noexcept {
  return std::min(cpu_features().simd_level, highest_level.load(std::memory_order_relaxed));
}

void limit_simd(SimdLevel highest) noexcept {
  highest_level.store(highest, std::memory_order_relaxed);
}

std::string cpu_feature_names() {
  std::string names = cpu_features().has_crc32c ? "sse4.2" : "";
  const SimdLevel level = simd_level();
  if (level >= SimdLevel::kAvx2) {
    names += ",avx2";
  }
  if (level >= SimdLevel::kAvx512) {
    names += ",avx512";
  }
  return names.empty() ? "baseline" : names;
}

}  // namespace kv
