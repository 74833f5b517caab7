// SPDX-License-Identifier: Apache-2.0
// Batches of extents into slots, and of slots into slots, for Python; slots are addresses.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <tuple>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "codec/extent_decode.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

/// Offset and nbytes in the memory; key, generation, record_nbytes, num_tokens; address of the
/// slot.
using ExtentTuple = std::tuple<std::uint64_t,
                               std::uint64_t,
                               std::string_view,
                               std::uint64_t,
                               std::uint64_t,
                               std::uint64_t,
                               std::uint64_t>;
/// Address to copy from, address to copy to, nbytes.
using CopyTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

struct ExtentJob {
  ConstBytes extent;
  ExpectedBlock expected;
  std::uint8_t* slot;
};

std::uint8_t* memory_at(std::uint64_t address) {
  KV_EXPECT(address != 0, ShapeError, "a slot needs an address");
  return reinterpret_cast<std::uint8_t*>(static_cast<std::uintptr_t>(address));
}

ExtentJob job_from(const ExtentTuple& tuple, ConstBytes memory) {
  const auto& [offset, nbytes, key, generation, record_nbytes, num_tokens, address] = tuple;
  ExtentJob job{
      memory.sub(offset, nbytes), {{}, generation, record_nbytes, num_tokens}, memory_at(address)};
  KV_EXPECT(key.size() == job.expected.key.size(), ShapeError, "a block key has 32 bytes");
  std::copy(key.begin(), key.end(), job.expected.key.begin());
  return job;
}

bool decode(const SlotCoding& coding, const ExtentJob& job) {
  try {
    return decode_extent(coding, job.expected, job.extent, job.slot);
  } catch (const Error&) {
    return false;  // the caller finds out why, of this one
  }
}

std::vector<std::size_t> decode_extents(const Geometry& geometry,
                                        unsigned dtype,
                                        bool has_lossy,
                                        const std::vector<const Calibration*>& calibrations,
                                        const py::buffer& memory,
                                        const std::vector<ExtentTuple>& extents) {
  const SlotCoding coding{geometry, dtype_from(dtype), has_lossy, calibrations};
  const HeldBuffer held(memory, false);
  std::vector<ExtentJob> jobs;
  jobs.reserve(extents.size());
  for (const ExtentTuple& extent : extents) {
    jobs.push_back(job_from(extent, held.readable()));
  }
  const py::gil_scoped_release released;
  std::vector<std::size_t> left;
  for (std::size_t number = 0; number < jobs.size(); ++number) {
    if (!decode(coding, jobs[number])) {
      left.push_back(number);
    }
  }
  return left;
}

void copy_memory(const std::vector<CopyTuple>& copies) {
  for (const auto& [from, to, nbytes] : copies) {
    static_cast<void>(memory_at(from));
    static_cast<void>(memory_at(to));
  }
  const py::gil_scoped_release released;
  for (const auto& [from, to, nbytes] : copies) {
    std::memmove(memory_at(to), memory_at(from), nbytes);
  }
}

}  // namespace

void bind_extents(py::module_& module) {
  module.def("decode_extents", &decode_extents, "geometry"_a, "dtype"_a, "has_lossy"_a,
             "calibrations"_a, "memory"_a, "extents"_a);
  module.def("copy_memory", &copy_memory, "copies"_a);
}

}  // namespace kv::bindings
