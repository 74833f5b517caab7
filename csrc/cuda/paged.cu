// SPDX-License-Identifier: Apache-2.0
// Gather and scatter between paged slots and dense rows on the device; the CPU twin is
// core/paged.cpp.
#include "core/device.hpp"
#include "cuda/check.hpp"
#include "cuda/device_guard.hpp"

namespace kv::device {
namespace {

constexpr unsigned kThreads = 256;

struct PagedParams {
  PagedPlane plane;
  std::uint8_t* pool_dev;
  const std::int32_t* slots_dev;
  const std::int32_t* row_starts_dev;
  std::uint8_t* dense_dev;
  std::int32_t* status_dev;
  std::uint64_t num_rows;
};

/// Copies the rows of one table entry, for one head.
///
/// Grid: x = table entries, y = heads; the threads of a block walk the run of rows, which is
/// contiguous in the slot, Word by Word, so that neighbours touch neighbouring memory. 2 x rows x
/// row_nbytes bytes are moved. Shared: none. Needs: row_nbytes and all addresses in multiples of
/// sizeof(Word). Stream: the caller's, no sync.
template <typename Word, bool kIsGather>
__global__ void __launch_bounds__(kThreads)
    move_rows_kernel(const __grid_constant__ PagedParams p) {
  const std::int64_t slot = p.slots_dev[blockIdx.x];
  const std::int64_t first = p.row_starts_dev[blockIdx.x];
  const std::int64_t rows = std::int64_t{p.row_starts_dev[blockIdx.x + 1]} - first;
  const bool is_valid = slot >= 0 && slot < static_cast<std::int64_t>(p.plane.num_slots) &&
                        first >= 0 && rows >= 0 && rows <= std::int64_t{p.plane.block_tokens} &&
                        first + rows <= static_cast<std::int64_t>(p.num_rows);
  if (!is_valid) {
    if (threadIdx.x == 0) {
      *p.status_dev = 1;  // every writer writes the same value
    }
    return;
  }
  const auto words = static_cast<std::uint32_t>(p.plane.row_nbytes / sizeof(Word));
  const std::uint64_t head = blockIdx.y;
  auto* paged = reinterpret_cast<Word*>(p.pool_dev + slot * p.plane.slot_nbytes +
                                        p.plane.plane_offset + head * p.plane.head_nbytes);
  auto* dense =
      reinterpret_cast<Word*>(p.dense_dev + (first * p.plane.kv_heads + head) * p.plane.row_nbytes);
  const std::uint64_t dense_stride = std::uint64_t{words} * p.plane.kv_heads;
  const auto total = static_cast<std::uint32_t>(rows) * words;  // below 2^30: a plane's limit
  for (std::uint32_t at = threadIdx.x; at < total; at += kThreads) {
    const std::uint64_t flat = (at / words) * dense_stride + at % words;
    if constexpr (kIsGather) {
      dense[flat] = paged[at];
    } else {
      paged[at] = dense[flat];
    }
  }
}

template <typename Word>
void launch_words(PagedMove move, const PagedParams& params, dim3 grid, cudaStream_t queue) {
  if (move == PagedMove::kGather) {
    move_rows_kernel<Word, true><<<grid, kThreads, 0, queue>>>(params);
  } else {
    move_rows_kernel<Word, false><<<grid, kThreads, 0, queue>>>(params);
  }
}

void check_arrays(const PagedPlane& plane, const PagedArrays& arrays, std::uint64_t num_blocks) {
  constexpr std::uint64_t kEntry = sizeof(std::int32_t);
  constexpr std::uint64_t kMaxBlocks = 0x7FFFFFFFU;  // grid limit
  KV_EXPECT(arrays.slots.nbytes % kEntry == 0 && num_blocks <= kMaxBlocks &&
                arrays.row_starts.nbytes == (num_blocks + 1) * kEntry,
            ShapeError,
            "block table of " + std::to_string(arrays.slots.nbytes) + " bytes with row starts of " +
                std::to_string(arrays.row_starts.nbytes) +
                " bytes; they are int32[n] and int32[n + 1]");
  KV_EXPECT(arrays.dense.nbytes % (plane.row_nbytes * plane.kv_heads) == 0, ShapeError,
            std::to_string(arrays.dense.nbytes) + " bytes are not a whole number of dense rows");
  KV_EXPECT((arrays.slots.address | arrays.row_starts.address | arrays.status) % kEntry == 0 &&
                arrays.status != 0,
            ShapeError,
            "block table, row starts and status must be aligned int32 in device memory");
  KV_EXPECT(arrays.pool.nbytes == plane.num_slots * plane.slot_nbytes, ShapeError,
            "the pool is not a whole number of slots");
}

}  // namespace

void move_paged_rows(PagedMove move,
                     const PagedPlane& plane,
                     const PagedArrays& arrays,
                     Stream stream) {
  const cudaStream_t queue = checked_stream(stream);
  const std::uint64_t num_blocks = arrays.slots.nbytes / sizeof(std::int32_t);
  check_arrays(plane, arrays, num_blocks);
  if (num_blocks == 0) {
    return;
  }
  const PagedParams params{plane,
                           reinterpret_cast<std::uint8_t*>(arrays.pool.address),
                           reinterpret_cast<const std::int32_t*>(arrays.slots.address),
                           reinterpret_cast<const std::int32_t*>(arrays.row_starts.address),
                           reinterpret_cast<std::uint8_t*>(arrays.dense.address),
                           reinterpret_cast<std::int32_t*>(arrays.status),
                           arrays.dense.nbytes / (plane.row_nbytes * plane.kv_heads)};
  const DeviceGuard guard(params.pool_dev, "the pool");
  const dim3 grid(static_cast<unsigned>(num_blocks), plane.kv_heads);
  // Plane and head offsets are multiples of row_nbytes.
  const std::uint64_t alignment =
      arrays.pool.address | arrays.dense.address | plane.plane_offset | plane.row_nbytes;
  if (alignment % sizeof(uint4) == 0) {
    launch_words<uint4>(move, params, grid, queue);
  } else {
    KV_EXPECT(alignment % sizeof(std::uint16_t) == 0, ShapeError,
              "pool or dense rows at an odd address");
    launch_words<std::uint16_t>(move, params, grid, queue);
  }
  KV_CUDA(cudaGetLastError(), "launch the row kernel");
}

}  // namespace kv::device
