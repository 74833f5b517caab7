// SPDX-License-Identifier: Apache-2.0
// One function per topic of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace kv::bindings {

/// Maps native errors to the classes of kvstore/errors.py; to be called first.
void bind_errors();
void bind_core(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_decode(pybind11::module_& module);
void bind_encode(pybind11::module_& module);

}  // namespace kv::bindings
