// SPDX-License-Identifier: Apache-2.0
// Native errors -> the classes of kvstore/errors.py.
#include <pybind11/gil_safe_call_once.h>

#include <exception>

#include "bindings/bind.hpp"
#include "core/error.hpp"

namespace py = pybind11;

namespace kv::bindings {
namespace {

struct ErrorClasses {
  py::object shape, config, corrupt, unsupported, capacity, io;
};

// Lives as long as the process: exception classes are needed by every translator call.
PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<ErrorClasses> error_classes;

ErrorClasses import_classes() {
  const py::module_ errors = py::module_::import("kvstore.errors");
  return ErrorClasses{errors.attr("ShapeError"),         errors.attr("ConfigError"),
                      errors.attr("CorruptRecordError"), errors.attr("UnsupportedFormatError"),
                      errors.attr("CapacityError"),      errors.attr("StoreIOError")};
}

void raise(const py::object& type, const Error& error) {
  PyErr_SetString(type.ptr(), error.what());
}

void raise_io(const py::object& type, const IoError& error) {
  if (error.error_number() == 0) {
    raise(type, error);
    return;
  }
  // OSError takes (errno, text) and offers both as attributes.
  PyErr_SetObject(type.ptr(), py::make_tuple(error.error_number(), error.what()).ptr());
}

void translate(std::exception_ptr pointer) {
  if (pointer == nullptr) {
    return;
  }
  const ErrorClasses& classes = error_classes.get_stored();
  try {
    std::rethrow_exception(pointer);
  } catch (const ShapeError& error) {
    raise(classes.shape, error);
  } catch (const ConfigError& error) {
    raise(classes.config, error);
  } catch (const CorruptRecord& error) {
    raise(classes.corrupt, error);
  } catch (const UnsupportedFormat& error) {
    raise(classes.unsupported, error);
  } catch (const CapacityError& error) {
    raise(classes.capacity, error);
  } catch (const IoError& error) {
    raise_io(classes.io, error);
  }
}

}  // namespace

py::object exception_from(const std::exception_ptr& error) {
  try {
    translate(error);
  } catch (const std::exception& other) {  // not one of ours: memory ran out
    PyErr_SetString(PyExc_RuntimeError, other.what());
  }
  const py::error_already_set raised;
  return raised.value();
}

void bind_errors() {
  error_classes.call_once_and_store_result(import_classes);
  py::register_local_exception_translator(translate);
}

}  // namespace kv::bindings
