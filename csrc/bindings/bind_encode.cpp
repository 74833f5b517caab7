// SPDX-License-Identifier: Apache-2.0
// Batches of blocks that warps encode, for Python; sources are addresses.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "bindings/places.hpp"
#include "warp/run.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

// Geometry, dtype, tokens, profile, steps as encode_record takes them, calibration, first token,
// sources, paging.
using RequestTuple = std::tuple<const Geometry*,
                                unsigned,
                                std::uint64_t,
                                unsigned,
                                std::tuple<int, int, bool, bool>,
                                const Calibration*,
                                std::uint64_t,
                                std::vector<TargetTuple>,
                                PagingTuple>;

py::bytes bytes_of(const std::vector<std::uint8_t>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

// A plan and what it refers to.
class HeldEncodePlan {
 public:
  explicit HeldEncodePlan(const py::list& requests) : kept_(requests) {
    for (const py::handle request : requests) {
      add(request.cast<RequestTuple>());
    }
    plan_.seal();
  }

  [[nodiscard]] std::uint64_t workspace_nbytes() const { return plan_.workspace_nbytes(); }
  [[nodiscard]] std::uint64_t results_nbytes() const { return plan_.results_nbytes(); }

  [[nodiscard]] py::bytes run_in_lockstep() const {
    std::vector<std::uint8_t> workspace;
    {
      const py::gil_scoped_release released;
      workspace = warp::run_in_lockstep(plan_);
    }
    return bytes_of(workspace);
  }

  void launch(const RangeTuple& workspace, std::uint64_t stream) const {
    const py::gil_scoped_release released;
    warp::launch(plan_, range_from(workspace), device::Stream{stream});
  }

  [[nodiscard]] std::vector<std::vector<RangeTuple>> pieces(const py::buffer& results) const {
    const HeldBuffer held(results, false);
    std::vector<std::vector<RangeTuple>> all;
    for (const auto& planes : plan_.pieces(held.readable())) {
      all.emplace_back();
      for (const auto& piece : planes) {
        all.back().emplace_back(piece.offset, piece.nbytes);
      }
    }
    return all;
  }

  [[nodiscard]] py::bytes assemble(std::size_t request,
                                   const py::buffer& results,
                                   const py::sequence& planes) const {
    const HeldBuffer held(results, false);
    const HeldBuffers pieces(planes);
    return bytes_of(plan_.assemble(request, held.readable(), pieces.bytes));
  }

 private:
  void add(const RequestTuple& tuple) {
    const auto& [geometry, dtype, tokens, profile, steps, calibration, first, sources, paging] =
        tuple;
    KV_EXPECT(geometry != nullptr, ShapeError, "a block to encode needs a geometry");
    WriterSettings settings;
    settings.profile = profile_from(profile);
    std::tie(settings.key_mult, settings.value_mult, settings.has_channel_values,
             settings.has_exact_keys) = steps;
    settings.calibration = calibration;
    plan_.add(warp::EncodeRequest{BlockView(*geometry, dtype_from(dtype), tokens), settings, first,
                                  targets_from(sources), paging_from(paging)});
  }

  py::list kept_;
  warp::EncodePlan plan_;
};

}  // namespace

void bind_encode(py::module_& module) {
  py::class_<HeldEncodePlan>(module, "EncodePlan")
      .def(py::init<const py::list&>(), "requests"_a)
      .def_property_readonly("workspace_nbytes", &HeldEncodePlan::workspace_nbytes)
      .def_property_readonly("results_nbytes", &HeldEncodePlan::results_nbytes)
      .def("run_in_lockstep", &HeldEncodePlan::run_in_lockstep)
      .def("launch", &HeldEncodePlan::launch, "workspace"_a, "stream"_a)
      .def("pieces", &HeldEncodePlan::pieces, "results"_a)
      .def("assemble", &HeldEncodePlan::assemble, "request"_a, "results"_a, "planes"_a);
}

}  // namespace kv::bindings
