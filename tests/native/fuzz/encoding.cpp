// SPDX-License-Identifier: Apache-2.0
// The target that writes records: settings and elements are cut from the fuzzer's bytes.
#include <algorithm>
#include <cstring>
#include <optional>

#include "codec/calibration.hpp"
#include "codec/record.hpp"
#include "core/crc32c.hpp"
#include "fuzz/guarded.hpp"
#include "fuzz/targets.hpp"

namespace kv::fuzz {

namespace {

/// Takes numbers from the front of the data; zeros when it has ended.
class Numbers {
 public:
  explicit Numbers(ConstBytes data) : data_(data) {}

  std::uint8_t byte() { return at_ < data_.size() ? data_.data()[at_++] : std::uint8_t{0}; }
  std::size_t below(std::size_t limit) { return byte() % limit; }
  /// The rest, repeated: an element sequence of any length.
  Buffer fill(std::size_t nbytes) {
    Buffer out(nbytes);
    const std::size_t rest = data_.size() - at_;
    for (std::size_t i = 0; rest > 0 && i < nbytes; ++i) {
      // The second time round is shifted by one, so that rows differ.
      out[i] = data_.data()[at_ + (i + i / rest) % rest];
    }
    return out;
  }

 private:
  ConstBytes data_;
  std::size_t at_ = 0;
};

void append16(Buffer& object, std::size_t value) {
  object.push_back(static_cast<std::uint8_t>(value));
  object.push_back(static_cast<std::uint8_t>(value >> 8));
}

/// Bases over some layers at a time; components are any numbers that may be there.
void append_bases(const Geometry& geometry, Numbers& numbers, Buffer& object) {
  const std::size_t layers = geometry.num_layers();
  const std::size_t group_layers = 1 + numbers.below(layers);
  append16(object, group_layers);
  append16(object, 0);
  for (std::size_t plane = 0; plane < 2 * layers; ++plane) {
    if (plane / 2 % group_layers != 0) {
      continue;
    }
    const std::size_t rows = std::min(group_layers, layers - plane / 2) * geometry.kv_heads();
    const std::size_t rank = std::min(numbers.below(70), rows * geometry.dim(plane));
    append16(object, rank);
    append16(object, 0);
    if (rank == 0) {
      continue;
    }
    const std::size_t levels = rank + (plane % 2 == 0 ? 0 : 2 * rows);
    for (std::size_t i = 0; i < levels; ++i) {
      append16(object, numbers.byte());
    }
    for (std::size_t i = 0; i < rows * rank * geometry.dim(plane); ++i) {
      object.push_back(numbers.byte());
      object.push_back(static_cast<std::uint8_t>(0x3B + numbers.below(5) + 128 * numbers.below(2)));
    }
    object.resize(round_up(object.size(), 4));
  }
}

/// A calibration object of this geometry, its values drawn from the fuzzer's bytes.
Buffer calibration_object(const Geometry& geometry, Numbers& numbers) {
  Buffer object(32);
  std::memcpy(object.data(), "KVCL\1", 5);
  for (std::size_t plane = 0; plane < geometry.num_planes(); ++plane) {
    const std::size_t heads = geometry.kv_heads();
    const std::size_t channels = heads * geometry.dim(plane);
    for (std::size_t h = 0; h < heads; ++h) {
      const int log_rms = static_cast<std::int8_t>(numbers.byte());
      object.push_back(static_cast<std::uint8_t>(log_rms));
      object.push_back(static_cast<std::uint8_t>(log_rms < 0 ? 0xFF : 0));
    }
    for (std::size_t c = 0; c < channels; ++c) {
      object.push_back(numbers.byte());
      object.push_back(static_cast<std::uint8_t>(0x3E + numbers.below(4)));
    }
    const std::size_t arrays =
        (calibrated_parameters_nbytes(heads, geometry.dim(plane)) - 2 * heads - 2 * channels) /
        channels;
    for (std::size_t i = 0; i < arrays * channels; ++i) {
      object.push_back(static_cast<std::uint8_t>(numbers.below(251)));
    }
    object.resize(round_up(object.size(), 4));
  }
  if (numbers.below(2) == 1) {
    object[12] = 1;
    append_bases(geometry, numbers, object);
  }
  const std::uint64_t total = object.size();
  std::memcpy(object.data() + 16, &total, sizeof total);
  const std::size_t sizes[] = {geometry.num_layers(), geometry.kv_heads(), geometry.key_dim(),
                               geometry.value_dim()};
  for (std::size_t i = 0; i < 4; ++i) {
    const auto size = static_cast<std::uint16_t>(sizes[i]);
    std::memcpy(object.data() + 24 + 2 * i, &size, sizeof size);
  }
  seal_calibration(object);
  return object;
}

bool is_exact(Profile profile) { return profile == Profile::kRaw || profile == Profile::kLossless; }

/// What was encoded, as decode_at lays it out.
Buffer packed(const BlockView& block, const Buffer& slot) {
  Buffer out;
  for (std::size_t plane = 0; plane < block.geometry.num_planes(); ++plane) {
    const auto rows = block.rows(slot.data(), plane);
    for (std::size_t h = 0; h < block.geometry.kv_heads(); ++h) {
      const std::uint8_t* row = rows.row(h, 0);
      out.insert(out.end(), row, row + block.num_tokens * block.geometry.row_nbytes(plane));
    }
  }
  return out;
}

}  // namespace

void round_trip(ConstBytes data) {
  Numbers numbers(data);
  constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
  // Without zstd, which lies outside.
  constexpr Profile kProfiles[] = {Profile::kRaw, Profile::kLossless, Profile::kQ8, Profile::kQ4,
                                   Profile::kQ3,  Profile::kQ2,       Profile::kPca};
  const DType dtype = kDTypes[numbers.below(3)];
  WriterSettings settings;
  settings.profile = kProfiles[numbers.below(7)];
  const std::size_t layers = 1 + numbers.below(2);
  // Now and then more than one segment can hold: several are coded at once.
  const std::size_t heads = 1 + (numbers.below(8) == 0 ? 6 + numbers.below(12) : numbers.below(3));
  const std::size_t key_dim = 1 + numbers.below(80);
  const std::size_t value_dim = 1 + numbers.below(80);
  const std::size_t tokens = 1 + numbers.below(40);
  const Geometry geometry(layers, heads, key_dim, value_dim, itemsize_of(dtype),
                          tokens + numbers.below(2));
  settings.key_mult = static_cast<std::int8_t>(numbers.byte());
  settings.value_mult = static_cast<std::int8_t>(numbers.byte());
  settings.has_channel_values = numbers.below(2) == 1;
  settings.has_exact_keys = numbers.below(8) == 1;
  const std::uint64_t first_token = numbers.below(2);
  std::optional<Calibration> calibration;
  Sample sample;
  if (numbers.below(2) == 1) {
    sample.calibration = calibration_object(geometry, numbers);
    calibration.emplace(ConstBytes{sample.calibration.data(), sample.calibration.size()},
                        CalibrationId{1});
    settings.calibration = &*calibration;
  }
  const Buffer slot = numbers.fill(geometry.slot_nbytes());
  static Guarded guarded;
  static Guarded guarded_record;
  const ConstBytes source = guarded.copy(slot);
  const BlockView block(geometry, dtype, tokens);

  at_all_levels([&](SimdLevel) {
    Buffer record(record_bound(block));
    record.resize(
        encode_record(block, settings, first_token, source, Bytes{record.data(), record.size()}));
    expect(sample.record.empty() || sample.record == record, "all levels encode alike");
    sample.record = record;
  });
  at_all_levels([&](SimdLevel) {
    const Bytes tight = guarded_record.room(sample.record.size(), 0xA5);
    expect(encode_record(block, settings, first_token, source, tight) == tight.size() &&
               std::memcmp(tight.data(), sample.record.data(), tight.size()) == 0,
           "a record fits room of its own size");
  });

  std::optional<Outcome> first;
  at_all_levels([&](SimdLevel level) {
    Outcome outcome = decode_at(sample, level);
    expect(outcome.verdict == Verdict::kDecoded, "what was encoded decodes");
    expect(!first || outcome == *first, "all levels decode alike");
    first = std::move(outcome);
  });
  if (is_exact(settings.profile)) {
    expect(first->slot == packed(block, slot), "exact profiles are exact");
  }
}

}  // namespace kv::fuzz
