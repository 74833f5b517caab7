// SPDX-License-Identifier: Apache-2.0
// Device copies and the row kernel for Python; device memory is (address, nbytes).
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "core/device.hpp"
#include "core/paged.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

using RunTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;
using RangeTuple = std::tuple<std::uint64_t, std::uint64_t>;

std::vector<device::CopyRun> runs_from(const std::vector<RunTuple>& tuples) {
  std::vector<device::CopyRun> runs;
  runs.reserve(tuples.size());
  for (const auto& [host_offset, device_offset, nbytes] : tuples) {
    runs.push_back(device::CopyRun{host_offset, device_offset, nbytes});
  }
  return runs;
}

device::DeviceBytes range_from(const RangeTuple& tuple) {
  return device::DeviceBytes{std::get<0>(tuple), std::get<1>(tuple)};
}

device::CopyMethod method_from(bool by_kernel) {
  return by_kernel ? device::CopyMethod::kKernel : device::CopyMethod::kEngine;
}

void copy_to_device(const py::buffer& host,
                    const RangeTuple& range,
                    const std::vector<RunTuple>& runs,
                    bool by_kernel,
                    std::uint64_t stream) {
  const HeldBuffer held(host, false);
  const std::vector<device::CopyRun> copies = runs_from(runs);
  const py::gil_scoped_release released;
  device::copy_to_device(held.readable(), range_from(range), copies, method_from(by_kernel),
                         device::Stream{stream});
}

void copy_to_host(const RangeTuple& range,
                  const py::buffer& host,
                  const std::vector<RunTuple>& runs,
                  bool by_kernel,
                  std::uint64_t stream) {
  const HeldBuffer held(host, true);
  const std::vector<device::CopyRun> copies = runs_from(runs);
  const py::gil_scoped_release released;
  device::copy_to_host(range_from(range), held.writable(), copies, method_from(by_kernel),
                       device::Stream{stream});
}

template <PagedMove move>
void move_rows(const Geometry& geometry,
               std::size_t plane,
               const RangeTuple& pool,
               const RangeTuple& slots,
               const RangeTuple& row_starts,
               const RangeTuple& dense,
               std::uint64_t status,
               std::uint64_t stream) {
  const device::PagedArrays arrays{range_from(pool), range_from(slots), range_from(row_starts),
                                   range_from(dense), status};
  const py::gil_scoped_release released;
  device::move_paged_rows(move, paged_plane(geometry, plane, arrays.pool.nbytes), arrays,
                          device::Stream{stream});
}

}  // namespace

void bind_device(py::module_& module) {
  module.def("copy_to_device", &copy_to_device, "host"_a, "device"_a, "runs"_a, "by_kernel"_a,
             "stream"_a);
  module.def("copy_to_host", &copy_to_host, "device"_a, "host"_a, "runs"_a, "by_kernel"_a,
             "stream"_a);
  module.def("device_gather_rows", &move_rows<PagedMove::kGather>, "geometry"_a, "plane"_a,
             "pool"_a, "slots"_a, "row_starts"_a, "dense"_a, "status"_a, "stream"_a);
  module.def("device_scatter_rows", &move_rows<PagedMove::kScatter>, "geometry"_a, "plane"_a,
             "pool"_a, "slots"_a, "row_starts"_a, "dense"_a, "status"_a, "stream"_a);
}

}  // namespace kv::bindings
