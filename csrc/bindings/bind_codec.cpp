// SPDX-License-Identifier: Apache-2.0
// Records for Python: numbers, tuples and buffers in, the same out.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "codec/container.hpp"
#include "codec/record.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

// offset, nbytes, raw_nbytes, coding, crc32c: the order of kvstore.codec.PlaneInfo.
using EntryTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, unsigned, std::uint32_t>;

Coding coding_from(unsigned number) {
  KV_EXPECT(number <= static_cast<unsigned>(Coding::kQ8), ShapeError,
            "unknown coding number " + std::to_string(number));
  return static_cast<Coding>(number);
}

PlaneEntry entry_from(const EntryTuple& tuple) {
  PlaneEntry entry;
  unsigned coding = 0;
  std::tie(entry.offset, entry.nbytes, entry.raw_nbytes, coding, entry.crc32c) = tuple;
  entry.coding = coding_from(coding);
  return entry;
}

RecordPart part_from(std::size_t first_plane,
                     const std::vector<EntryTuple>& entries,
                     ConstBytes data,
                     std::uint64_t data_offset) {
  RecordPart part{first_plane, {}, data, data_offset};
  part.planes.reserve(entries.size());
  for (const EntryTuple& entry : entries) {
    part.planes.push_back(entry_from(entry));
  }
  return part;
}

py::tuple probe_record(const py::buffer& record) {
  const HeldBuffer held(record, false);
  const RecordInfo info = parse_header(held.readable());
  py::list planes;
  for (const PlaneEntry& entry : info.planes) {
    planes.append(py::make_tuple(entry.offset, entry.nbytes, entry.raw_nbytes,
                                 static_cast<unsigned>(entry.coding), entry.crc32c));
  }
  return py::make_tuple(py::make_tuple(info.major, info.minor), static_cast<unsigned>(info.profile),
                        info.num_layers, info.kv_heads, info.key_dim, info.value_dim,
                        static_cast<unsigned>(info.dtype), info.num_tokens, info.first_token,
                        info.header_nbytes(), info.total_nbytes, planes);
}

std::vector<std::size_t> find_nonfinite(const Geometry& geometry,
                                        unsigned dtype,
                                        std::uint64_t num_tokens,
                                        const py::buffer& slot) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer held(slot, false);
  const py::gil_scoped_release released;
  return nonfinite_planes(block, held.readable());
}

void split(const Geometry& geometry,
           unsigned dtype,
           std::uint64_t num_tokens,
           const py::buffer& slot,
           const std::vector<std::size_t>& planes,
           const py::buffer& streams) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(slot, false);
  const HeldBuffer to(streams, true);
  const py::gil_scoped_release released;
  split_planes(block, from.readable(), planes, to.writable());
}

std::size_t encode(const Geometry& geometry,
                   unsigned dtype,
                   std::uint64_t num_tokens,
                   unsigned profile,
                   std::uint64_t first_token,
                   const py::buffer& slot,
                   const std::vector<unsigned>& codings,
                   const py::sequence& streams,
                   const py::buffer& out) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(slot, false);
  const HeldBuffer to(out, true);
  const HeldBuffers stored(streams);
  std::vector<Coding> checked;
  checked.reserve(codings.size());
  for (const unsigned coding : codings) {
    checked.push_back(coding_from(coding));
  }
  const Profile allowed = profile_from(profile);
  const py::gil_scoped_release released;
  return encode_record(block, allowed, first_token, from.readable(), checked, stored.bytes,
                       to.writable());
}

py::list open(const Geometry& geometry,
              unsigned dtype,
              std::uint64_t num_tokens,
              std::size_t first_plane,
              const std::vector<EntryTuple>& entries,
              const py::buffer& data,
              std::uint64_t data_offset) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer held(data, false);
  const RecordPart part = part_from(first_plane, entries, held.readable(), data_offset);
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
            std::size_t first_plane,
            const std::vector<EntryTuple>& entries,
            const py::buffer& data,
            std::uint64_t data_offset,
            const py::sequence& streams,
            const py::buffer& slot) {
  const BlockView block(geometry, dtype_from(dtype), num_tokens);
  const HeldBuffer from(data, false);
  const HeldBuffer to(slot, true);
  const HeldBuffers plain(streams);
  const RecordPart part = part_from(first_plane, entries, from.readable(), data_offset);
  const py::gil_scoped_release released;
  decode_planes(block, part, plain.bytes, to.writable());
}

}  // namespace

void bind_codec(py::module_& module) {
  module.def("probe_record", &probe_record, "record"_a);
  module.def(
      "record_bound",
      [](const Geometry& geometry, unsigned dtype, std::uint64_t num_tokens) {
        return record_bound(BlockView(geometry, dtype_from(dtype), num_tokens));
      },
      "geometry"_a, "dtype"_a, "num_tokens"_a);
  module.def("find_nonfinite", &find_nonfinite, "geometry"_a, "dtype"_a, "num_tokens"_a, "slot"_a);
  module.def("split_planes", &split, "geometry"_a, "dtype"_a, "num_tokens"_a, "slot"_a, "planes"_a,
             "streams"_a);
  module.def("encode_record", &encode, "geometry"_a, "dtype"_a, "num_tokens"_a, "profile"_a,
             "first_token"_a, "slot"_a, "codings"_a, "streams"_a, "out"_a);
  module.def("open_planes", &open, "geometry"_a, "dtype"_a, "num_tokens"_a, "first_plane"_a,
             "entries"_a, "data"_a, "data_offset"_a);
  module.def("decode_planes", &decode, "geometry"_a, "dtype"_a, "num_tokens"_a, "first_plane"_a,
             "entries"_a, "data"_a, "data_offset"_a, "streams"_a, "slot"_a);
}

}  // namespace kv::bindings
