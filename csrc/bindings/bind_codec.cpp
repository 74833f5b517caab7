// SPDX-License-Identifier: Apache-2.0
// Records for Python: numbers, tuples and buffers in, the same out.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "bindings/part.hpp"
#include "codec/container.hpp"
#include "codec/record.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

py::tuple probe_record(const py::buffer& record) {
  const HeldBuffer held(record, false);
  const RecordInfo info = parse_header(held.readable());
  const auto* id = reinterpret_cast<const char*>(info.calibration.data());
  return py::make_tuple(py::make_tuple(info.major, info.minor), static_cast<unsigned>(info.profile),
                        info.num_layers, info.kv_heads, info.key_dim, info.value_dim,
                        static_cast<unsigned>(info.dtype), info.num_tokens, info.segment_tokens,
                        info.first_token, py::bytes(id, info.calibration.size()),
                        info.header_nbytes(), info.total_nbytes, PlaneDirectory(info));
}

Calibration make_calibration(const py::buffer& data, const py::buffer& id) {
  const HeldBuffer held(data, false);
  const HeldBuffer held_id(id, false);
  CalibrationId copied;
  KV_EXPECT(held_id.readable().size() == copied.size(), ShapeError,
            "a calibration's id has 16 bytes");
  std::copy_n(held_id.readable().data(), copied.size(), copied.begin());
  return Calibration(held.readable(), copied);
}

void split(const Geometry& geometry,
           unsigned dtype,
           std::uint64_t num_tokens,
           const py::buffer& slot,
           const py::buffer& streams) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(slot, false);
  const HeldBuffer to(streams, true);
  const py::gil_scoped_release released;
  split_planes(block, from.readable(), to.writable());
}

std::size_t encode(const Geometry& geometry,
                   unsigned dtype,
                   std::uint64_t num_tokens,
                   unsigned profile,
                   const std::tuple<int, int, bool, bool>& steps,
                   const Calibration* calibration,
                   std::uint64_t first_token,
                   const py::buffer& slot,
                   const std::vector<bool>& is_split,
                   const py::sequence& streams,
                   const py::buffer& out) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(slot, false);
  const HeldBuffer to(out, true);
  const HeldBuffers stored(streams);
  WriterSettings settings;
  settings.profile = profile_from(profile);
  std::tie(settings.key_mult, settings.value_mult, settings.has_channel_values,
           settings.has_exact_keys) = steps;
  settings.calibration = calibration;
  settings.is_split = is_split;
  settings.streams = stored.bytes;
  const py::gil_scoped_release released;
  return encode_record(block, settings, first_token, from.readable(), to.writable());
}

py::list open(const Geometry& geometry,
              unsigned dtype,
              std::uint64_t num_tokens,
              const PartArguments& arguments) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer held(arguments.data, false);
  const RecordPart part = arguments.part(held.readable());
  std::vector<StoredStream> streams;
  {
    const py::gil_scoped_release released;
    streams = open_planes(block, part);
  }
  py::list spans;
  for (const StoredStream& stream : streams) {
    spans.append(py::make_tuple(stream.offset, stream.nbytes));
  }
  return spans;
}

void decode(const Geometry& geometry,
            unsigned dtype,
            std::uint64_t num_tokens,
            const PartArguments& arguments,
            const py::sequence& streams,
            const Calibration* calibration,
            const py::buffer& slot) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(arguments.data, false);
  const HeldBuffer to(slot, true);
  const HeldBuffers plain(streams);
  const RecordPart part = arguments.part(from.readable());
  const Bytes bytes = to.writable();
  check_slot(block, bytes.size());
  std::vector<TargetRows> targets;
  for (std::size_t index = part.num_leading; index < part.planes.size(); ++index) {
    KV_EXPECT(fits(part.first_plane, index + 1, geometry.num_planes()), ShapeError,
              "planes beyond the layout's " + std::to_string(geometry.num_planes()));
    targets.push_back(block.rows(bytes.data(), part.first_plane + index));
  }
  const Window all{0, geometry.kv_heads(), 0, block.num_tokens};
  const py::gil_scoped_release released;
  decode_planes(block, part, plain.bytes, calibration, all, targets);
}

// One of the two tensors of decode_rows: [layers, heads, tokens, dim], rows contiguous.
py::buffer_info checked_rows(const py::buffer& rows,
                             std::size_t layers,
                             const Window& window,
                             std::size_t dim,
                             std::size_t itemsize) {
  py::buffer_info info = rows.request(true);
  const std::vector<std::size_t> wanted{layers, window.num_heads, window.num_tokens, dim};
  bool is_right = info.ndim == 4 && info.itemsize == static_cast<py::ssize_t>(itemsize);
  for (std::size_t axis = 0; is_right && axis < wanted.size(); ++axis) {
    is_right = info.shape[axis] == static_cast<py::ssize_t>(wanted[axis]);
  }
  KV_EXPECT(is_right && info.strides[3] == static_cast<py::ssize_t>(itemsize), ShapeError,
            "rows go to [layers, heads, tokens, dim], contiguous in the last; wanted [" +
                std::to_string(layers) + ", " + std::to_string(window.num_heads) + ", " +
                std::to_string(window.num_tokens) + ", " + std::to_string(dim) + "] of " +
                std::to_string(itemsize) + " bytes");
  return info;
}

void decode_rows(const Geometry& geometry,
                 unsigned dtype,
                 std::uint64_t num_tokens,
                 const PartArguments& arguments,
                 const py::sequence& streams,
                 const Calibration* calibration,
                 const std::tuple<std::size_t, std::size_t, std::size_t, std::size_t>& wanted,
                 const py::buffer& keys,
                 const py::buffer& values) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(arguments.data, false);
  const HeldBuffers plain(streams);
  const RecordPart part = arguments.part(from.readable());
  KV_EXPECT(part.first_plane % 2 == 0 && part.planes.size() % 2 == 0 && part.num_leading % 2 == 0 &&
                part.num_leading <= part.planes.size(),
            ShapeError, "rows are decoded for whole layers");
  const auto [first_head, num_heads, first_token, tokens] = wanted;
  const Window window{first_head, num_heads, first_token, tokens};
  const std::size_t layers = part.num_wanted() / 2;
  const std::size_t itemsize = geometry.itemsize();
  const py::buffer_info infos[] = {
      checked_rows(keys, layers, window, geometry.key_dim(), itemsize),
      checked_rows(values, layers, window, geometry.value_dim(), itemsize)};
  std::vector<TargetRows> targets;
  for (std::size_t index = 0; index < part.num_wanted(); ++index) {
    const py::buffer_info& info = infos[index % 2];
    targets.push_back(TargetRows{static_cast<std::uint8_t*>(info.ptr) +
                                     static_cast<py::ssize_t>(index / 2) * info.strides[0],
                                 info.strides[1], info.strides[2]});
  }
  const py::gil_scoped_release released;
  decode_planes(block, part, plain.bytes, calibration, window, targets);
}

}  // namespace

void bind_codec(py::module_& module) {
  py::class_<Calibration>(module, "Calibration")
      .def(py::init(&make_calibration), "data"_a, "id_bytes"_a);
  py::class_<PartArguments>(module, "RecordPart");
  py::class_<PlaneDirectory>(module, "PlaneDirectory")
      .def("entries", &PlaneDirectory::entries)
      .def("span", &PlaneDirectory::span, "first"_a, "end"_a)
      .def("needs_calibration", &PlaneDirectory::needs_calibration, "first"_a, "end"_a)
      .def("part", &PlaneDirectory::part, "first"_a, "end"_a, "data"_a, "data_offset"_a);
  module.def("probe_record", &probe_record, "record"_a);
  module.def(
      "record_bound",
      [](const Geometry& geometry, unsigned dtype, std::uint64_t num_tokens) {
        return record_bound(BlockView(geometry, dtype_from(dtype), num_tokens));
      },
      "geometry"_a, "dtype"_a, "num_tokens"_a);
  module.def("split_planes", &split, "geometry"_a, "dtype"_a, "num_tokens"_a, "slot"_a,
             "streams"_a);
  module.def("encode_record", &encode, "geometry"_a, "dtype"_a, "num_tokens"_a, "profile"_a,
             "steps"_a, "calibration"_a, "first_token"_a, "slot"_a, "is_split"_a, "streams"_a,
             "out"_a);
  module.def("open_planes", &open, "geometry"_a, "dtype"_a, "num_tokens"_a, "part"_a);
  module.def("decode_planes", &decode, "geometry"_a, "dtype"_a, "num_tokens"_a, "part"_a,
             "streams"_a, "calibration"_a, "slot"_a);
  module.def("decode_rows", &decode_rows, "geometry"_a, "dtype"_a, "num_tokens"_a, "part"_a,
             "streams"_a, "calibration"_a, "wanted"_a, "keys"_a, "values"_a);
}

}  // namespace kv::bindings
