// SPDX-License-Identifier: Apache-2.0
// One function per topic of the Python module.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace kv::bindings {

/// Maps native errors to the classes of kvstore/errors.py; to be called first.
void bind_errors();

/// The exception that Python would see if native code threw `error`. Call with the GIL held.
[[nodiscard]] pybind11::object exception_from(const std::exception_ptr& error);
void bind_core(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_extents(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_decode(pybind11::module_& module);
void bind_encode(pybind11::module_& module);
void bind_put(pybind11::module_& module);
void bind_index(pybind11::module_& module);

}  // namespace kv::bindings
