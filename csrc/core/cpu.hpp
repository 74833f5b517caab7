// SPDX-License-Identifier: Apache-2.0
// What the CPU can do, asked once at run time, and the attributes that let one function use it: the
// build itself targets the baseline of the architecture, so that one wheel runs everywhere.
#pragma once

#include <string>

// KV_BASELINE leaves the variants out, so that tests can run the plain loops on any machine.
#if defined(__x86_64__) && !defined(KV_BASELINE)
#define KV_X86 1
#define KV_TARGET_CRC __attribute__((target("sse4.2")))
#define KV_TARGET_CLMUL __attribute__((target("avx512f,avx512dq,vpclmulqdq")))
#define KV_TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define KV_TARGET_AVX2 __attribute__((target("avx2,bmi2,popcnt")))
#define KV_TARGET_AVX512                                                                          \
  __attribute__((                                                                                 \
      target("avx2,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,prefer-" \
             "vector-width=512")))
#endif

/// A loop body that is compiled once per target attribute of its callers.
#define KV_INLINE inline __attribute__((always_inline))

namespace kv {

/// Sets of instructions that loops are written for, each including those before it.
enum class SimdLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

struct CpuFeatures {
  bool has_crc32c = false;                      ///< SSE4.2
  bool has_vector_clmul = false;                ///< VPCLMULQDQ, AVX-512 F and DQ
  bool has_vnni = false;                        ///< AVX-512 VNNI
  SimdLevel simd_level = SimdLevel::kBaseline;  ///< kAvx512 means F, BW, DQ, VL, VBMI and VBMI2
};

[[nodiscard]] const CpuFeatures& cpu_features() noexcept;

/// The level to be used: the CPU's, or lower where limit_simd said so.
[[nodiscard]] SimdLevel simd_level() noexcept;

/// Keeps loops of a higher level from being used, in the whole process: for comparing them.
void limit_simd(SimdLevel highest) noexcept;

/// Comma-separated names of the features in use; "baseline" when there are none.
[[nodiscard]] std::string cpu_feature_names();

}  // namespace kv
