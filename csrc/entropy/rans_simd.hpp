// SPDX-License-Identifier: Apache-2.0
// The coder's loops for newer CPUs; the same words as the plain ones, byte for byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/cpu.hpp"
#include "entropy/rans.hpp"

#ifdef KV_X86

namespace kv {

void read_groups_avx2(const ReadJob* jobs,
                      std::size_t num_jobs,
                      std::size_t rows,
                      std::size_t groups) noexcept;
void read_groups_avx512(const ReadJob* jobs,
                        std::size_t num_jobs,
                        std::size_t rows,
                        std::size_t groups) noexcept;

/// The arguments of RansWriter::write_groups, and the writer's states and place.
struct WriteJob {
  const std::uint8_t* symbols;
  const WriteEntry* table;
  const std::uint32_t* bases;
  std::uint8_t symbol_mask;
  std::size_t rows;
  std::size_t groups;
  std::uint32_t* states;
  std::uint8_t* next;
};

/// Returns where the last word was written.
std::uint8_t* write_groups_avx2(const WriteJob& job) noexcept;
std::uint8_t* write_groups_avx512(const WriteJob& job) noexcept;

}  // namespace kv

#endif
