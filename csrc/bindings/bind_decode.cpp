// SPDX-License-Identifier: Apache-2.0
// Batches of records that warps decode, for Python; targets are addresses.
#include <pybind11/stl.h>

#include <deque>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "bindings/part.hpp"
#include "bindings/places.hpp"
#include "warp/run.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

using RequestTuple = std::tuple<const Geometry*,
                                unsigned,
                                std::uint64_t,
                                const PartArguments*,
                                const Calibration*,
                                std::vector<TargetTuple>,
                                PagingTuple>;

// A plan and what it refers to.
class HeldPlan {
 public:
  explicit HeldPlan(const py::list& requests) : kept_(requests) {
    for (const py::handle request : requests) {
      add(request.cast<RequestTuple>());
    }
    const py::gil_scoped_release released;
    plan_.seal();
  }

  [[nodiscard]] std::uint64_t workspace_nbytes() const { return plan_.workspace_nbytes(); }
  [[nodiscard]] std::uint64_t zeroed_nbytes() const { return plan_.zeroed_nbytes(); }

  [[nodiscard]] std::vector<std::string> faults(const py::buffer& zeroed) const {
    const HeldBuffer held(zeroed, false);
    return merged(plan_.faults(held.readable()));
  }

  [[nodiscard]] std::vector<std::string> run_in_lockstep() const {
    const py::gil_scoped_release released;
    const std::vector<std::uint8_t> zeroed = warp::run_in_lockstep(plan_);
    return merged(plan_.faults(ConstBytes(zeroed.data(), zeroed.size())));
  }

  void upload(const RangeTuple& workspace, std::uint64_t stream) const {
    const py::gil_scoped_release released;
    warp::upload(plan_, range_from(workspace), device::Stream{stream});
  }

  void launch(const RangeTuple& workspace, std::uint64_t stream) const {
    const py::gil_scoped_release released;
    warp::launch(plan_, range_from(workspace), device::Stream{stream});
  }

 private:
  void add(const RequestTuple& tuple) {
    const auto& [geometry, dtype, tokens, arguments, calibration, targets, paging] = tuple;
    KV_EXPECT(geometry != nullptr && arguments != nullptr, ShapeError,
              "a record to decode needs a geometry and a part");
    buffers_.emplace_back(arguments->data, false);
    const warp::DecodeRequest request{BlockView(*geometry, dtype_from(dtype), tokens),
                                      arguments->part(buffers_.back().readable()), calibration,
                                      targets_from(targets), paging_from(paging)};
    const py::gil_scoped_release released;
    try {
      plan_.add(request);
      damages_.emplace_back();
    } catch (const CorruptRecord& error) {
      damages_.emplace_back(error.what());
    }
  }

  // Damage that was found while planning, and what the run found of the others.
  [[nodiscard]] std::vector<std::string> merged(std::vector<std::string> faults) const {
    std::vector<std::string> all = damages_;
    auto fault = faults.begin();
    for (std::string& each : all) {
      if (each.empty()) {
        each = std::move(*fault++);
      }
    }
    return all;
  }

  py::list kept_;
  std::deque<HeldBuffer> buffers_;
  std::vector<std::string> damages_;
  warp::DecodePlan plan_;
};

}  // namespace

void bind_decode(py::module_& module) {
  py::class_<HeldPlan>(module, "DecodePlan")
      .def(py::init<const py::list&>(), "requests"_a)
      .def_property_readonly("workspace_nbytes", &HeldPlan::workspace_nbytes)
      .def_property_readonly("zeroed_nbytes", &HeldPlan::zeroed_nbytes)
      .def("faults", &HeldPlan::faults, "zeroed"_a)
      .def("run_in_lockstep", &HeldPlan::run_in_lockstep)
      .def("upload", &HeldPlan::upload, "workspace"_a, "stream"_a)
      .def("launch", &HeldPlan::launch, "workspace"_a, "stream"_a);
}

}  // namespace kv::bindings
