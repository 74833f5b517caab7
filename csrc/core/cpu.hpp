// SPDX-License-Identifier: Apache-2.0
// What the CPU can do, asked once at run time, and the attributes that let one function use it: the
// build itself targets the baseline of the architecture, so that one wheel runs everywhere.
#pragma once

#include <string>

// KV_BASELINE leaves the variants out, so that tests can run the plain loops on any machine.
#if defined(__x86_64__) && !defined(KV_BASELINE)
#define KV_X86 1
#define KV_TARGET_CRC __attribute__((target("sse4.2")))
#define KV_TARGET_AVX2 __attribute__((target("avx2")))
#endif

/// A loop body that is compiled once per target attribute of its callers.
#define KV_INLINE inline __attribute__((always_inline))

namespace kv {

struct CpuFeatures {
  bool has_crc32c = false;  ///< SSE4.2
  bool has_avx2 = false;
};

[[nodiscard]] const CpuFeatures& cpu_features() noexcept;

/// Comma-separated names of the features in use; "baseline" when there are none.
[[nodiscard]] std::string cpu_feature_names();

}  // namespace kv
