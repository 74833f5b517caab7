// SPDX-License-Identifier: Apache-2.0
// Files, tickets and arenas for Python, with the lifetimes that Python expects.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "io/arena.hpp"
#include "io/direct_file.hpp"
#include "io/io_pool.hpp"

namespace py = pybind11;
using py::literals::operator""_a;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

namespace kv::bindings {
namespace {

// DirectFile that Python can close: transfers in flight keep the native file open until they end.
class PyFile {
 public:
  PyFile(const std::filesystem::path& path, bool writable)
      : file_(std::make_shared<DirectFile>(path.string(), writable)) {}

  [[nodiscard]] std::shared_ptr<DirectFile> get() const {
    std::shared_ptr<DirectFile> file = std::atomic_load(&file_);
    KV_EXPECT(file != nullptr, ConfigError, "this file is closed");
    return file;
  }
  void close() { std::atomic_store(&file_, std::shared_ptr<DirectFile>()); }

 private:
  std::shared_ptr<DirectFile> file_;
};

// Ticket that keeps the Python buffer of its transfers alive until they have ended.
class PyTicket {
 public:
  PyTicket(std::shared_ptr<Ticket> ticket, HeldBuffer buffer)
      : ticket_(std::move(ticket)), buffer_(std::move(buffer)) {}
  PyTicket(const PyTicket&) = delete;
  PyTicket& operator=(const PyTicket&) = delete;
  PyTicket(PyTicket&&) = delete;
  PyTicket& operator=(PyTicket&&) = delete;

  // A dropped ticket waits: its memory must not be reused under a running transfer.
  ~PyTicket() {
    const py::gil_scoped_release released;
    try {
      ticket_->wait();
    } catch (const Error&) {
      // Nobody is left to hear it: the caller chose not to wait.
    }
  }

  [[nodiscard]] bool done() const { return ticket_->done(); }

  void wait() {
    {
      const py::gil_scoped_release released;
      ticket_->wait();
    }
    buffer_.reset();
  }

 private:
  std::shared_ptr<Ticket> ticket_;
  std::optional<HeldBuffer> buffer_;
};

using OpTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

std::vector<IoOp> ops_from(const std::vector<OpTuple>& tuples) {
  std::vector<IoOp> ops;
  ops.reserve(tuples.size());
  for (const auto& [file_offset, buffer_offset, nbytes] : tuples) {
    ops.push_back(IoOp{file_offset, buffer_offset, nbytes});
  }
  return ops;
}

std::unique_ptr<PyTicket> submit_read(IoPool& pool,
                                      const PyFile& file,
                                      const py::buffer& buffer,
                                      const std::vector<OpTuple>& ops) {
  HeldBuffer held(buffer, true);
  std::shared_ptr<Ticket> ticket = pool.submit_read(file.get(), held.writable(), ops_from(ops));
  return std::make_unique<PyTicket>(std::move(ticket), std::move(held));
}

std::unique_ptr<PyTicket> submit_write(IoPool& pool,
                                       const PyFile& file,
                                       const py::buffer& buffer,
                                       const std::vector<OpTuple>& ops) {
  HeldBuffer held(buffer, false);
  std::shared_ptr<Ticket> ticket = pool.submit_write(file.get(), held.readable(), ops_from(ops));
  return std::make_unique<PyTicket>(std::move(ticket), std::move(held));
}

py::buffer_info arena_buffer(Arena& arena) {
  KV_EXPECT(!arena.is_closed(), ConfigError, "this arena is closed");
  return py::buffer_info(arena.bytes().data(), static_cast<py::ssize_t>(arena.bytes().size()));
}

void bind_file(py::module_& module) {
  py::class_<PyFile>(module, "DirectFile")
      .def(py::init<const std::filesystem::path&, bool>(), "path"_a, "writable"_a, WithoutGil())
      .def_property_readonly("is_direct",
                             [](const PyFile& file) { return file.get()->is_direct(); })
      .def(
          "size", [](const PyFile& file) { return file.get()->size(); }, WithoutGil())
      .def(
          "preallocate",
          [](const PyFile& file, std::uint64_t nbytes) { file.get()->preallocate(nbytes); },
          "nbytes"_a, WithoutGil())
      .def(
          "sync", [](const PyFile& file) { file.get()->sync(); }, WithoutGil())
      .def(
          "drop_cache", [](const PyFile& file) { file.get()->drop_cache(); }, WithoutGil())
      .def("close", &PyFile::close, WithoutGil());
}

void bind_pool(py::module_& module) {
  py::class_<PyTicket>(module, "Ticket").def("done", &PyTicket::done).def("wait", &PyTicket::wait);
  py::class_<IoPool>(module, "IoPool")
      .def(py::init<std::size_t>(), "num_threads"_a)
      .def("submit_read", &submit_read, "file"_a, "buffer"_a, "ops"_a)
      .def("submit_write", &submit_write, "file"_a, "buffer"_a, "ops"_a)
      .def("close", &IoPool::close, WithoutGil());
}

void bind_arena(py::module_& module) {
  py::class_<Arena>(module, "Arena", py::buffer_protocol())
      .def(py::init<std::size_t, bool>(), "nbytes"_a, "pinned"_a, WithoutGil())
      .def_buffer(&arena_buffer)
      .def_property_readonly("nbytes", [](const Arena& arena) { return arena.bytes().size(); })
      .def_property_readonly("is_pinned", &Arena::is_pinned)
      .def("close", &Arena::close);
}

}  // namespace

void bind_io(py::module_& module) {
  bind_file(module);
  bind_pool(module);
  bind_arena(module);
}

}  // namespace kv::bindings
