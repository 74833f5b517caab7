// SPDX-License-Identifier: Apache-2.0
// The only way from a Python buffer to native bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/span.hpp"

namespace kv::bindings {

/// Holds one contiguous Python buffer; its memory stays valid, and cannot be resized, until
/// destruction.
///
/// Create and destroy with the GIL held. The bytes may be used without it.
class HeldBuffer {
 public:
  /// @throws ShapeError unless `object` offers contiguous memory, writable if asked.
  HeldBuffer(pybind11::handle object, bool is_writable);
  HeldBuffer(const HeldBuffer&) = delete;
  HeldBuffer& operator=(const HeldBuffer&) = delete;
  HeldBuffer(HeldBuffer&& other) noexcept;
  HeldBuffer& operator=(HeldBuffer&&) = delete;
  ~HeldBuffer();

  /// @throws ShapeError when the buffer was taken as read-only.
  [[nodiscard]] Bytes writable() const;
  [[nodiscard]] ConstBytes readable() const noexcept;

 private:
  Py_buffer view_{};
};

/// Several read-only buffers and their bytes.
struct HeldBuffers {
  std::vector<HeldBuffer> holders;
  std::vector<ConstBytes> bytes;
  explicit HeldBuffers(const pybind11::sequence& objects);
};

}  // namespace kv::bindings
