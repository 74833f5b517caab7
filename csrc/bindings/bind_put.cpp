// SPDX-License-Identifier: Apache-2.0
// Blocks to extents for Python: many in one call, packed one behind the other.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "codec/container.hpp"
#include "codec/extent.hpp"
#include "codec/record.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

// Slot, tokens, first token, key, generation.
using BlockTuple = std::tuple<py::object, std::uint64_t, std::uint64_t, py::bytes, std::uint64_t>;

BlockKey key_from(const py::bytes& bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  BlockKey key;
  KV_EXPECT(view.size() == key.size(), ShapeError,
            "a block key has 32 bytes, got " + std::to_string(view.size()));
  std::copy(view.begin(), view.end(), key.begin());
  return key;
}

struct HeldBlock {
  BlockView view;
  std::uint64_t first_token;
  HeldBuffer slot;
  BlockKey key;
  std::uint64_t generation;
};

struct PackedRecord {
  std::size_t offset;
  std::size_t nbytes;
};

std::vector<PackedRecord> pack(const std::vector<HeldBlock>& blocks,
                               const WriterSettings& settings,
                               Bytes out) {
  std::vector<PackedRecord> packed;
  packed.reserve(blocks.size());
  std::size_t at = 0;
  for (const HeldBlock& block : blocks) {
    const Bytes room = out.sub(at, out.size() - at);
    KV_EXPECT(room.size() >= kExtentHeaderNbytes, ShapeError, "no room for an extent header");
    const Bytes record = room.sub(kExtentHeaderNbytes, room.size() - kExtentHeaderNbytes);
    const std::size_t nbytes =
        encode_record(block.view, settings, block.first_token, block.slot.readable(), record);
    packed.push_back(PackedRecord{at + kExtentHeaderNbytes, nbytes});
    at += seal_extent(block.key, block.generation, nbytes, room);
  }
  return packed;
}

py::list pack_extents(const Geometry& geometry,
                      unsigned dtype,
                      unsigned profile,
                      const std::tuple<int, int, bool, bool>& steps,
                      const Calibration* calibration,
                      const std::vector<BlockTuple>& tuples,
                      const py::buffer& out) {
  WriterSettings settings;
  settings.profile = profile_from(profile);
  std::tie(settings.key_mult, settings.value_mult, settings.has_channel_values,
           settings.has_exact_keys) = steps;
  settings.calibration = calibration;
  std::vector<HeldBlock> blocks;
  blocks.reserve(tuples.size());
  for (const auto& [slot, num_tokens, first_token, key, generation] : tuples) {
    blocks.push_back(HeldBlock{BlockView(geometry, dtype_from(dtype), num_tokens), first_token,
                               HeldBuffer(slot, false), key_from(key), generation});
  }
  const HeldBuffer to(out, true);
  std::vector<PackedRecord> packed;
  {
    const py::gil_scoped_release released;
    packed = pack(blocks, settings, to.writable());
  }
  const std::size_t header_nbytes = kHeaderNbytes + kEntryNbytes * geometry.num_planes();
  const auto* data = reinterpret_cast<const char*>(to.readable().data());
  py::list found(packed.size());
  for (std::size_t index = 0; index < packed.size(); ++index) {
    found[index] =
        py::make_tuple(packed[index].nbytes, py::bytes(data + packed[index].offset, header_nbytes));
  }
  return found;
}

std::size_t seal(const py::bytes& key,
                 std::uint64_t generation,
                 std::uint64_t record_nbytes,
                 const py::buffer& room) {
  const HeldBuffer to(room, true);
  const BlockKey copied = key_from(key);
  const py::gil_scoped_release released;
  return seal_extent(copied, generation, record_nbytes, to.writable());
}

}  // namespace

void bind_put(py::module_& module) {
  module.def("pack_extents", &pack_extents, "geometry"_a, "dtype"_a, "profile"_a, "steps"_a,
             "calibration"_a, "blocks"_a, "out"_a);
  module.def("seal_extent", &seal, "key"_a, "generation"_a, "record_nbytes"_a, "room"_a);
}

}  // namespace kv::bindings
