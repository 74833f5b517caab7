// SPDX-License-Identifier: Apache-2.0
// Checks bases in the order of their fields, and unpacks them.
#include "basis/basis.hpp"

#include <algorithm>
#include <string>

#include "core/endian.hpp"
#include "planes/parameters.hpp"

namespace kv {
namespace {

// The bits of 2.0: components of a vector of length 1 stay below, with room for rounding.
constexpr std::uint16_t kTooLarge = 0x4000;
constexpr std::uint16_t kMagnitude = 0x7FFF;

// Takes fields from the front of untrusted bytes.
class Fields {
 public:
  explicit Fields(ConstBytes bytes) : bytes_(bytes) {}

  template <typename Integer>
  [[nodiscard]] Integer take() {
    return load_le<Integer>(claim(sizeof(Integer)));
  }
  template <typename Integer>
  [[nodiscard]] std::vector<Integer> take(std::uint64_t count) {
    // Counts are products of three 16-bit sizes at most: their bytes fit 64 bits.
    const std::uint8_t* from = claim(count * sizeof(Integer));
    std::vector<Integer> taken(static_cast<std::size_t>(count));
    for (Integer& each : taken) {
      each = load_le<Integer>(from);
      from += sizeof(Integer);
    }
    return taken;
  }
  void align() { static_cast<void>(claim(round_up(at_, kSectionAlignment) - at_)); }
  void expect_end() const {
    KV_EXPECT(at_ == bytes_.size(), CorruptRecord,
              "calibration has bytes behind its bases that belong to nothing");
  }

 private:
  const std::uint8_t* claim(std::uint64_t nbytes) {
    KV_EXPECT(fits(at_, nbytes, bytes_.size()), CorruptRecord,
              "calibration has bases that do not fit it");
    const std::uint8_t* from = bytes_.data() + at_;
    at_ += nbytes;
    return from;
  }

  ConstBytes bytes_;
  std::uint64_t at_ = 0;
};

Basis read_basis(Fields& fields, const Basis& sizes, bool has_scales) {
  Basis basis = sizes;
  basis.rank = fields.take<std::uint16_t>();
  KV_EXPECT(basis.rank <= basis.channels(), CorruptRecord,
            "calibration has a basis of " + std::to_string(basis.rank) + " components for " +
                std::to_string(basis.channels()) + " channels");
  KV_EXPECT(fields.take<std::uint16_t>() == 0, CorruptRecord,
            "calibration has a reserved field that is not 0");
  if (basis.rank == 0) {
    return basis;
  }
  basis.log_sigma = fields.take<std::int16_t>(basis.rank);
  if (has_scales) {
    basis.scale_base = fields.take<std::int16_t>(basis.rows());
    basis.scale_log_sigma = fields.take<std::int16_t>(basis.rows());
  }
  basis.components = fields.take<std::uint16_t>(std::uint64_t{basis.rank} * basis.channels());
  fields.align();
  const bool is_valid =
      std::all_of(basis.scale_base.begin(), basis.scale_base.end(),
                  [](int base) { return base >= -kMaxLogRms && base <= kMaxLogRms; }) &&
      std::all_of(basis.components.begin(), basis.components.end(),
                  [](std::uint16_t bits) { return (bits & kMagnitude) < kTooLarge; });
  KV_EXPECT(is_valid, CorruptRecord, "calibration has a basis with a value out of range");
  return basis;
}

std::uint8_t class_of(int level) noexcept {
  const int wanted = ((level + 8) >> 4) + 6;
  return static_cast<std::uint8_t>(std::clamp(wanted, 0, static_cast<int>(kNumClasses) - 1));
}

}  // namespace

std::vector<std::uint8_t> Basis::classes(int mult) const {
  std::vector<std::uint8_t> found(runs() * kGroup, static_cast<std::uint8_t>(kNullClass));
  for (std::size_t entry = 0; entry < entries(); ++entry) {
    found[entry] = entry < rank ? class_of(log_sigma[entry] + 4 * mult)
                                : class_of(scale_log_sigma[entry - rank]);
  }
  return found;
}

Bases read_bases(ConstBytes bytes, const ModelSizes& sizes) {
  Fields fields(bytes);
  Bases bases;
  bases.group_layers = fields.take<std::uint16_t>();
  KV_EXPECT(bases.group_layers >= 1 && bases.group_layers <= sizes.layers, CorruptRecord,
            "calibration has bases over " + std::to_string(bases.group_layers) + " of " +
                std::to_string(sizes.layers) + " layers");
  KV_EXPECT(fields.take<std::uint16_t>() == 0, CorruptRecord,
            "calibration has a reserved field that is not 0");
  for (std::size_t first = 0; first < sizes.layers; first += bases.group_layers) {
    Basis group;
    group.layers = std::min(bases.group_layers, sizes.layers - first);
    group.heads = sizes.heads;
    group.dim = sizes.key_dim;
    bases.keys.push_back(read_basis(fields, group, false));
    group.dim = sizes.value_dim;
    bases.values.push_back(read_basis(fields, group, true));
  }
  fields.expect_end();
  return bases;
}

PlaneShape symbol_shape(const Basis& basis,
                        std::size_t tokens,
                        std::size_t segment_tokens) noexcept {
  return PlaneShape{basis.runs(), tokens, kGroup, DType::kFloat16, segment_tokens};
}

std::size_t chosen_segment_runs(std::size_t runs,
                                std::size_t tokens,
                                std::size_t segment_tokens) noexcept {
  const std::size_t rows = kGroup * std::min(segment_tokens, tokens);
  const std::size_t most = std::max(std::size_t{1}, kMaxSegmentSymbols / rows);
  const std::size_t groups = (runs + most - 1) / most;
  return (runs + groups - 1) / groups;
}

}  // namespace kv
