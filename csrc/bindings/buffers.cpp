// SPDX-License-Identifier: Apache-2.0
// Acquires and releases Python buffers.
#include "bindings/buffers.hpp"

#include <string>
#include <utility>

namespace py = pybind11;

namespace kv::bindings {

HeldBuffer::HeldBuffer(py::handle object, bool is_writable) {
  const int flags = is_writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
  if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
    PyErr_Clear();
    throw ShapeError(located(std::string("a contiguous ") + (is_writable ? "writable " : "") +
                                 "buffer is needed; got " + Py_TYPE(object.ptr())->tp_name,
                             __FILE__, __LINE__));
  }
}

HeldBuffer::HeldBuffer(HeldBuffer&& other) noexcept : view_(std::exchange(other.view_, {})) {}

HeldBuffer::~HeldBuffer() {
  PyBuffer_Release(&view_);  // does nothing for a view that was moved away
}

Bytes HeldBuffer::writable() const {
  KV_EXPECT(view_.readonly == 0, ShapeError, "the buffer is read-only");
  return Bytes(static_cast<std::uint8_t*>(view_.buf), static_cast<std::size_t>(view_.len));
}

ConstBytes HeldBuffer::readable() const noexcept {
  return ConstBytes(static_cast<const std::uint8_t*>(view_.buf),
                    static_cast<std::size_t>(view_.len));
}

HeldBuffers::HeldBuffers(const py::sequence& objects) {
  holders.reserve(objects.size());
  bytes.reserve(objects.size());
  for (const py::handle object : objects) {
    holders.emplace_back(object, false);
    bytes.push_back(holders.back().readable());
  }
}

}  // namespace kv::bindings
