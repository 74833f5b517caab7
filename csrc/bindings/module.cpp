// SPDX-License-Identifier: Apache-2.0
// The Python module kvstore._native.
#include "bindings/bind.hpp"

PYBIND11_MODULE(_native, module) {
  kv::bindings::bind_errors();
  kv::bindings::bind_core(module);
  kv::bindings::bind_codec(module);
  kv::bindings::bind_extents(module);
  kv::bindings::bind_io(module);
  kv::bindings::bind_device(module);
  kv::bindings::bind_decode(module);
  kv::bindings::bind_encode(module);
  kv::bindings::bind_put(module);
  kv::bindings::bind_index(module);
}
