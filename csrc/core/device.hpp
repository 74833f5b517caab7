// SPDX-License-Identifier: Apache-2.0
// What the rest of the native code asks of an accelerator. Defined in csrc/cuda when built with
// nvcc, otherwise by device_none.cpp, where there are no devices. Addresses of device memory are
// plain integers, owned by the caller.
#pragma once

#include <cstdint>
#include <vector>

#include "core/paged.hpp"
#include "core/span.hpp"

namespace kv::device {

/// True when this build contains the CUDA part, whether or not a device is there.
[[nodiscard]] bool is_built() noexcept;

/// Devices that can be used; 0 when there is no driver.
[[nodiscard]] int count() noexcept;

/// Page-locks host memory for fast copies, for all devices. @throws IoError.
void pin(Bytes memory);
void unpin(Bytes memory) noexcept;

/// A handle of the engine's stream. Never the default stream: that one waits for all others.
struct Stream {
  std::uint64_t handle;
};

/// Caller-owned range of device memory.
struct DeviceBytes {
  std::uint64_t address;
  std::uint64_t nbytes;
};

/// One copy between `host_offset` of a host buffer and `device_offset` of a device buffer.
struct CopyRun {
  std::uint64_t host_offset;
  std::uint64_t device_offset;
  std::uint64_t nbytes;
};

/// Joins neighbours that continue each other on both sides; order is kept, empty runs are dropped.
[[nodiscard]] std::vector<CopyRun> coalesce(const std::vector<CopyRun>& runs);

/// Who carries copies out. Copy engines leave the multiprocessors to the model, but every run costs
/// them a fixed time; a kernel that reads or writes pinned host memory itself is faster for many
/// small runs.
enum class CopyMethod : int { kEngine = 0, kKernel = 1 };

/// Queues the copies on `stream` and returns; `host` must stay alive and unchanged until the stream
/// has passed them. Runs may be carried out in any order. Where a kernel cannot (host memory that
/// is not pinned, or something that is no multiple of 16 bytes), the copy engine is used.
/// @throws ShapeError for a range outside its buffer (nothing is queued then), IoError.
void copy_to_device(ConstBytes host,
                    DeviceBytes device,
                    const std::vector<CopyRun>& runs,
                    CopyMethod method,
                    Stream stream);
void copy_to_host(DeviceBytes device,
                  Bytes host,
                  const std::vector<CopyRun>& runs,
                  CopyMethod method,
                  Stream stream);

/// Arguments of the device twin of kv::move_paged_rows; all four arrays lie in device memory.
struct PagedArrays {
  DeviceBytes pool;
  DeviceBytes slots;       ///< int32[num_blocks]
  DeviceBytes row_starts;  ///< int32[num_blocks + 1]
  DeviceBytes dense;
  std::uint64_t status;  ///< address of one int32 that becomes 1 when a table entry was refused
};

/// Queues one kernel on `stream` and returns. The table is checked on the device: a refused entry
/// moves nothing and sets `status`, which the caller has zeroed and reads after the stream has
/// passed.
void move_paged_rows(PagedMove move,
                     const PagedPlane& plane,
                     const PagedArrays& arrays,
                     Stream stream);

}  // namespace kv::device
