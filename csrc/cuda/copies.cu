// SPDX-License-Identifier: Apache-2.0
// Copies between host and device: one submission to the copy engine, or a kernel for small runs.
#include <algorithm>
#include <string>
#include <vector>

#include "core/device.hpp"
#include "cuda/check.hpp"
#include "cuda/device_guard.hpp"

namespace kv::device {
namespace {

constexpr unsigned kThreads = 256;
// Few multiprocessors saturate the bus, and the others belong to the model.
constexpr unsigned kMaxBlocks = 16;
constexpr unsigned kWarp = 32;
constexpr unsigned kWords = 8;
using Word = uint4;
// What a warp has in flight at a time: host memory is microseconds away.
constexpr unsigned kSliceNbytes = kWarp * kWords * sizeof(Word);
constexpr std::size_t kMaxRuns = 1024;
constexpr std::uint64_t kMaxRunNbytes = std::uint64_t{1} << 30;

struct KernelRun {
  std::uint64_t source;
  std::uint64_t target;
  std::uint32_t nbytes;
  std::uint32_t first_slice;
};

// Travels as an argument of the kernel: no table has to outlive the call.
struct KernelCopies {
  const std::uint8_t* source_base;
  std::uint8_t* target_base;
  std::uint32_t num_runs;
  std::uint32_t num_slices;
  KernelRun runs[kMaxRuns];
};

/// Copies slices of runs, a warp each at a time.
///
/// Grid: x = any number of blocks of kThreads; warps take slices in turn. The bytes of all runs are
/// read once and written once. Shared: none. Needs: bases, offsets and lengths in multiples of
/// sizeof(Word); host memory mapped for the device. Stream: the caller's, no sync.
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ KernelCopies p) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned num_warps = gridDim.x * (kThreads / kWarp);
  for (unsigned slice = (blockIdx.x * kThreads + threadIdx.x) / kWarp; slice < p.num_slices;
       slice += num_warps) {
    unsigned run = 0;
    for (unsigned count = p.num_runs; count > 1;) {  // the last one that begins at or before
      const unsigned half = count / 2;
      run += p.runs[run + half].first_slice <= slice ? half : 0;
      count -= half;
    }
    const KernelRun& found = p.runs[run];
    const unsigned offset = (slice - found.first_slice) * kSliceNbytes;
    const unsigned words = min(found.nbytes - offset, kSliceNbytes) / sizeof(Word);
    const auto* source = reinterpret_cast<const Word*>(p.source_base + found.source + offset);
    auto* target = reinterpret_cast<Word*>(p.target_base + found.target + offset);
    Word held[kWords];
#pragma unroll
    for (unsigned at = 0; at < kWords; ++at) {
      if (at * kWarp + lane < words) {
        held[at] = __ldcs(source + at * kWarp + lane);
      }
    }
#pragma unroll
    for (unsigned at = 0; at < kWords; ++at) {
      if (at * kWarp + lane < words) {
        __stcs(target + at * kWarp + lane, held[at]);
      }
    }
  }
}

void check_runs(const std::vector<CopyRun>& runs,
                std::uint64_t host_nbytes,
                std::uint64_t device_nbytes) {
  for (const CopyRun& run : runs) {
    KV_EXPECT(fits(run.host_offset, run.nbytes, host_nbytes) &&
                  fits(run.device_offset, run.nbytes, device_nbytes),
              ShapeError,
              "copy of " + std::to_string(run.nbytes) + " bytes between host offset " +
                  std::to_string(run.host_offset) + " of " + std::to_string(host_nbytes) +
                  " and device offset " + std::to_string(run.device_offset) + " of " +
                  std::to_string(device_nbytes));
  }
}

// One direction of one call.
struct Copies {
  std::uint8_t* host;
  std::uint64_t device;
  bool is_to_device;

  [[nodiscard]] const void* source(const CopyRun& run) const {
    return is_to_device ? static_cast<const void*>(host + run.host_offset)
                        : reinterpret_cast<const void*>(device + run.device_offset);
  }
  [[nodiscard]] void* target(const CopyRun& run) const {
    return is_to_device ? reinterpret_cast<void*>(device + run.device_offset)
                        : static_cast<void*>(host + run.host_offset);
  }
};

// False where the driver, or the toolkit of this build, has no such call.
bool submit_batch(const Copies& copies, const std::vector<CopyRun>& runs, cudaStream_t queue) {
#if CUDART_VERSION >= 13000
  std::vector<void*> targets;
  std::vector<const void*> sources;
  std::vector<std::size_t> sizes;
  for (const CopyRun& run : runs) {
    targets.push_back(copies.target(run));
    sources.push_back(copies.source(run));
    sizes.push_back(run.nbytes);
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;
  const cudaError_t status = cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(),
                                                  runs.size(), &attributes, &first, 1, queue);
  if (status == cudaErrorNotSupported || status == cudaErrorCallRequiresNewerDriver) {
    static_cast<void>(cudaGetLastError());  // it must not surface in the next checked call
    return false;
  }
  KV_CUDA(status, "queue a batch of copies");
  return true;
#else
  static_cast<void>(copies);
  static_cast<void>(runs);
  static_cast<void>(queue);
  return false;
#endif
}

void copy_by_engine(const Copies& copies, const std::vector<CopyRun>& runs, cudaStream_t queue) {
  if (runs.size() > 1 && submit_batch(copies, runs, queue)) {
    return;
  }
  const cudaMemcpyKind kind = copies.is_to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
  for (const CopyRun& run : runs) {
    KV_CUDA(cudaMemcpyAsync(copies.target(run), copies.source(run), run.nbytes, kind, queue),
            "queue a copy");
  }
}

// The host memory as the device sees it; null when it is not pinned.
std::uint8_t* mapped(std::uint8_t* host) {
  void* address = nullptr;
  if (cudaHostGetDevicePointer(&address, host, 0) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  return static_cast<std::uint8_t*>(address);
}

void launch(KernelCopies& table, cudaStream_t queue) {
  constexpr unsigned kWarps = kThreads / kWarp;
  const unsigned blocks = std::min(kMaxBlocks, (table.num_slices + kWarps - 1) / kWarps);
  copy_kernel<<<blocks, kThreads, 0, queue>>>(table);
  KV_CUDA(cudaGetLastError(), "launch the copy kernel");
  table.num_runs = table.num_slices = 0;
}

// False, with nothing queued, where a kernel cannot.
bool copy_by_kernel(const Copies& copies, const std::vector<CopyRun>& runs, cudaStream_t queue) {
  std::uint8_t* const host = mapped(copies.host);
  std::uint64_t alignment = copies.device | reinterpret_cast<std::uintptr_t>(host);
  for (const CopyRun& run : runs) {
    alignment |= run.host_offset | run.device_offset | run.nbytes;
  }
  if (host == nullptr || alignment % sizeof(Word) != 0) {
    return false;
  }
  auto* const device = reinterpret_cast<std::uint8_t*>(copies.device);
  const DeviceGuard guard(device, "the device buffer");
  KernelCopies table{
      copies.is_to_device ? host : device, copies.is_to_device ? device : host, 0, 0, {}};
  for (const CopyRun& run : runs) {
    for (std::uint64_t at = 0; at < run.nbytes; at += kMaxRunNbytes) {
      if (table.num_runs == kMaxRuns) {
        launch(table, queue);
      }
      const auto nbytes = static_cast<std::uint32_t>(std::min(run.nbytes - at, kMaxRunNbytes));
      const std::uint64_t on_host = run.host_offset + at;
      const std::uint64_t on_device = run.device_offset + at;
      table.runs[table.num_runs++] =
          KernelRun{copies.is_to_device ? on_host : on_device,
                    copies.is_to_device ? on_device : on_host, nbytes, table.num_slices};
      table.num_slices += (nbytes + kSliceNbytes - 1) / kSliceNbytes;
    }
  }
  if (table.num_runs > 0) {
    launch(table, queue);
  }
  return true;
}

void copy(const Copies& copies,
          const std::vector<CopyRun>& runs,
          CopyMethod method,
          cudaStream_t queue) {
  const std::vector<CopyRun> joined = coalesce(runs);
  if (method != CopyMethod::kKernel || !copy_by_kernel(copies, joined, queue)) {
    copy_by_engine(copies, joined, queue);
  }
}

}  // namespace

void copy_to_device(ConstBytes host,
                    DeviceBytes device,
                    const std::vector<CopyRun>& runs,
                    CopyMethod method,
                    Stream stream) {
  const cudaStream_t queue = checked_stream(stream);
  check_runs(runs, host.size(), device.nbytes);
  // Only read from: one description serves both directions.
  copy(Copies{const_cast<std::uint8_t*>(host.data()), device.address, true}, runs, method, queue);
}

void copy_to_host(DeviceBytes device,
                  Bytes host,
                  const std::vector<CopyRun>& runs,
                  CopyMethod method,
                  Stream stream) {
  const cudaStream_t queue = checked_stream(stream);
  check_runs(runs, host.size(), device.nbytes);
  copy(Copies{host.data(), device.address, false}, runs, method, queue);
}

}  // namespace kv::device
