// SPDX-License-Identifier: Apache-2.0
// Files, tickets and arenas for Python, with the lifetimes that Python expects.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
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

// Deletes what may take long to end, or to give back, while other threads run Python.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* owned) const {
    const py::gil_scoped_release released;
    delete owned;
  }
};

template <typename T>
using Owner = std::unique_ptr<T, DeleteWithoutGil>;

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
  void cancel() { ticket_->cancel(); }

  bool wait(std::optional<double> timeout_s) {
    std::optional<Ticket::Clock::time_point> deadline;
    if (timeout_s.has_value()) {
      // Longer than any wait, and still far from the clock's end.
      const double wait_s = std::clamp(*timeout_s, 0.0, 1e8);
      deadline = Ticket::Clock::now() + std::chrono::duration_cast<Ticket::Clock::duration>(
                                            std::chrono::duration<double>(wait_s));
    }
    {
      const py::gil_scoped_release released;
      if (!ticket_->wait_until(deadline)) {
        return false;
      }
    }
    buffer_.reset();
    return true;
  }

  std::vector<std::size_t> wait_some(bool may_wait) {
    const py::gil_scoped_release released;
    return ticket_->wait_some(may_wait);
  }

  [[nodiscard]] py::dict errors() const {
    py::dict found;
    for (const auto& [op, error] : ticket_->errors()) {
      found[py::int_(op)] = exception_from(error);
    }
    return found;
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

void read(IoPool& pool,
          const PyFile& file,
          const py::buffer& buffer,
          const std::vector<OpTuple>& ops) {
  const HeldBuffer held(buffer, true);
  std::shared_ptr<DirectFile> opened = file.get();
  const py::gil_scoped_release released;
  pool.read(std::move(opened), held.writable(), ops_from(ops));
}

void write(IoPool& pool,
           const PyFile& file,
           const py::buffer& buffer,
           const std::vector<OpTuple>& ops) {
  const HeldBuffer held(buffer, false);
  std::shared_ptr<DirectFile> opened = file.get();
  const py::gil_scoped_release released;
  pool.write(std::move(opened), held.readable(), ops_from(ops));
}

Owner<IoPool> make_pool(std::size_t num_threads,
                        const std::optional<std::string>& engine,
                        unsigned depth) {
  IoPool::Options options{num_threads, std::nullopt, depth};
  if (engine.has_value()) {
    KV_EXPECT(*engine == "threads" || *engine == "io_uring", ConfigError,
              "engine is '" + *engine + "'; it must be 'io_uring', 'threads', or None for either");
    options.engine = *engine == "threads" ? EngineKind::kThreads : EngineKind::kUring;
  }
  const py::gil_scoped_release released;
  return Owner<IoPool>(new IoPool(options));
}

py::buffer_info arena_buffer(Arena& arena) {
  return py::buffer_info(arena.bytes().data(), static_cast<py::ssize_t>(arena.bytes().size()));
}

void bind_file(py::module_& module) {
  py::class_<PyFile, Owner<PyFile>>(module, "DirectFile")
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
  py::class_<PyTicket>(module, "Ticket")
      .def("done", &PyTicket::done)
      .def("wait", &PyTicket::wait, "timeout_s"_a = py::none())
      .def("wait_some", &PyTicket::wait_some, "may_wait"_a = true)
      .def("errors", &PyTicket::errors)
      .def("cancel", &PyTicket::cancel);
  py::class_<IoPool, Owner<IoPool>>(module, "IoPool")
      .def(py::init(&make_pool), "num_threads"_a, "engine"_a = py::none(), "depth"_a = 64)
      .def_property_readonly("engine", &IoPool::engine)
      .def("submit_read", &submit_read, "file"_a, "buffer"_a, "ops"_a)
      .def("submit_write", &submit_write, "file"_a, "buffer"_a, "ops"_a)
      .def("read", &read, "file"_a, "buffer"_a, "ops"_a)
      .def("write", &write, "file"_a, "buffer"_a, "ops"_a)
      .def("close", &IoPool::close, WithoutGil());
}

void bind_arena(py::module_& module) {
  py::class_<Arena, Owner<Arena>>(module, "Arena", py::buffer_protocol())
      .def(py::init<std::size_t, bool>(), "nbytes"_a, "pinned"_a, WithoutGil())
      .def_buffer(&arena_buffer)
      .def_property_readonly("nbytes", [](const Arena& arena) { return arena.bytes().size(); })
      .def_property_readonly("is_pinned", &Arena::is_pinned);
}

}  // namespace

void bind_io(py::module_& module) {
  bind_file(module);
  bind_pool(module);
  bind_arena(module);
}

}  // namespace kv::bindings
