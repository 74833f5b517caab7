// SPDX-License-Identifier: Apache-2.0
// Quantising and bringing back rows of bfloat16, the dtype of nearly all caches: what a channel
// keeps from token to token stays in registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu.hpp"
#include "elements/element_loops.hpp"

namespace kv {

/// The first `count` channels.
struct QuantisedChannels {
  std::size_t count;
  bool has_exceptions;
};

#ifdef KV_X86

/// ElementLoops::energy of a row of whole vectors: dim is a multiple of 16.
float energy_bfloat16_avx512(const std::uint8_t* source, std::size_t dim) noexcept;
/// Quantises the channels that whole vectors cover.
QuantisedChannels quantise_bfloat16_avx512(const QuantiseRows& rows) noexcept;

/// Brings back the channels that whole vectors cover, and returns how many these are.
template <typename Quantised>
std::size_t restore_bfloat16_avx2(const RestoreRows<Quantised>& rows) noexcept;
template <typename Quantised>
std::size_t restore_bfloat16_avx512(const RestoreRows<Quantised>& rows) noexcept;

#endif

}  // namespace kv
