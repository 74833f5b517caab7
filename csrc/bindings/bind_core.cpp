// SPDX-License-Identifier: Apache-2.0
// Checksums, geometry and the row mover for Python.
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "core/cpu.hpp"
#include "core/crc32c.hpp"
#include "core/device.hpp"
#include "core/geometry.hpp"
#include "core/paged.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

using CrcFunction = std::uint32_t (*)(ConstBytes, std::uint32_t) noexcept;

template <CrcFunction function>
std::uint32_t crc_of(const py::buffer& data, std::uint32_t seed) {
  const HeldBuffer held(data, false);
  const py::gil_scoped_release released;
  return function(held.readable(), seed);
}

void gather_rows(const Geometry& geometry,
                 std::size_t plane,
                 const py::buffer& pool,
                 const py::buffer& slots,
                 const py::buffer& row_starts,
                 const py::buffer& dense) {
  const HeldBuffer from(pool, false);
  const HeldBuffer table(slots, false);
  const HeldBuffer starts(row_starts, false);
  const HeldBuffer to(dense, true);
  const py::gil_scoped_release released;
  const ConstBytes source = from.readable();
  // Gathering only reads the pool.
  move_paged_rows(PagedMove::kGather, paged_plane(geometry, plane, source.size()),
                  Bytes(const_cast<std::uint8_t*>(source.data()), source.size()), table.readable(),
                  starts.readable(), to.writable());
}

void scatter_rows(const Geometry& geometry,
                  std::size_t plane,
                  const py::buffer& pool,
                  const py::buffer& slots,
                  const py::buffer& row_starts,
                  const py::buffer& dense) {
  const HeldBuffer to(pool, true);
  const HeldBuffer table(slots, false);
  const HeldBuffer starts(row_starts, false);
  const HeldBuffer from(dense, false);
  const py::gil_scoped_release released;
  const ConstBytes source = from.readable();
  // Scattering only reads the dense rows.
  move_paged_rows(PagedMove::kScatter, paged_plane(geometry, plane, to.writable().size()),
                  to.writable(), table.readable(), starts.readable(),
                  Bytes(const_cast<std::uint8_t*>(source.data()), source.size()));
}

void limit_simd_to(const std::string& name) {
  const std::vector<std::pair<std::string, SimdLevel>> levels{{"baseline", SimdLevel::kBaseline},
                                                              {"avx2", SimdLevel::kAvx2},
                                                              {"avx512", SimdLevel::kAvx512}};
  for (const auto& [known, level] : levels) {
    if (name == known) {
      limit_simd(level);
      return;
    }
  }
  KV_EXPECT(false, ConfigError, "unknown level " + name + ": use baseline, avx2 or avx512");
}

py::dict build_info() {
  py::dict info;
  info["version"] = KV_VERSION;
  info["has_cuda"] = device::is_built();
  info["cuda_devices"] = device::count();
  info["simd"] = cpu_feature_names();
  return info;
}

}  // namespace

void bind_core(py::module_& module) {
  module.def("crc32c", &crc_of<&crc32c>, "data"_a, "seed"_a = 0);
  module.def("crc32c_table", &crc_of<&crc32c_table>, "data"_a, "seed"_a = 0);
  module.def("build_info", &build_info);
  module.def("limit_simd", &limit_simd_to, "level"_a);
  py::class_<Geometry>(module, "Geometry")
      .def(py::init<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t,
                    std::uint64_t>(),
           "num_layers"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a, "itemsize"_a, "block_tokens"_a)
      .def_property_readonly("num_layers", &Geometry::num_layers)
      .def_property_readonly("kv_heads", &Geometry::kv_heads)
      .def_property_readonly("key_dim", &Geometry::key_dim)
      .def_property_readonly("value_dim", &Geometry::value_dim)
      .def_property_readonly("itemsize", &Geometry::itemsize)
      .def_property_readonly("block_tokens", &Geometry::block_tokens)
      .def_property_readonly("slot_nbytes", &Geometry::slot_nbytes);
  module.def("gather_rows", &gather_rows, "geometry"_a, "plane"_a, "pool"_a, "slots"_a,
             "row_starts"_a, "dense"_a);
  module.def("scatter_rows", &scatter_rows, "geometry"_a, "plane"_a, "pool"_a, "slots"_a,
             "row_starts"_a, "dense"_a);
}

}  // namespace kv::bindings
