// SPDX-License-Identifier: Apache-2.0
// The targets that read records and calibration objects.
#include <cstring>
#include <memory>
#include <optional>

#include "codec/calibration.hpp"
#include "codec/container.hpp"
#include "codec/record.hpp"
#include "fuzz/guarded.hpp"
#include "fuzz/targets.hpp"

namespace kv::fuzz {

namespace {

constexpr std::uint64_t kMostRawNbytes = std::uint64_t{1} << 20U;

/// Everything that decoding needs beside the wanted rows; refused bytes throw here or when decoded.
struct Opened {
  RecordInfo info;
  BlockView block;
  RecordPart part;
  std::unique_ptr<Calibration> calibration;
  std::vector<Buffer> inflated;
  std::vector<ConstBytes> streams;
};

std::uint64_t raw_nbytes(const RecordInfo& info) {
  std::uint64_t nbytes = 0;
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    nbytes += info.shape(plane).raw_nbytes();
  }
  return nbytes;
}

std::unique_ptr<Calibration> calibration_of(const Sample& sample, const RecordInfo& info) {
  if (sample.calibration.empty() || info.calibration == CalibrationId{}) {
    return nullptr;
  }
  auto parsed = std::make_unique<Calibration>(
      ConstBytes{sample.calibration.data(), sample.calibration.size()}, info.calibration);
  const bool fits = parsed->num_layers() == info.num_layers &&
                    parsed->kv_heads() == info.kv_heads && parsed->key_dim() == info.key_dim &&
                    parsed->value_dim() == info.value_dim;
  return fits ? std::move(parsed) : nullptr;
}

/// Nothing when the block is too large. Lasts until the next call.
std::optional<Opened> open(const Sample& sample) {
  static Guarded guarded;
  const ConstBytes record = guarded.copy(sample.record);
  RecordInfo info = parse_header(record);
  if (raw_nbytes(info) > kMostRawNbytes) {
    return std::nullopt;
  }
  const Geometry geometry(info.num_layers, info.kv_heads, info.key_dim, info.value_dim,
                          itemsize_of(info.dtype), info.num_tokens);
  const BlockView block(geometry, info.dtype, info.num_tokens);
  RecordPart part{0, info.planes, info.segment_tokens, record, 0};
  Opened opened{info, block, part, calibration_of(sample, info), {}, {}};

  const std::vector<StoredStream> stored = open_planes(block, part);
  // Callers look the calibration object up, and refuse a record whose object they do not find.
  for (const PlaneEntry& entry : info.planes) {
    KV_EXPECT(!is_calibrated(entry) || opened.calibration, CorruptRecord, "no calibration");
  }
  std::size_t at = 0;
  for (std::size_t plane = 0; plane < info.planes.size(); ++plane) {
    for (std::size_t b = 0; info.planes[plane].coding == Coding::kSplit && b < geometry.itemsize();
         ++b) {
      const StoredStream& stream = stored.at(at++);
      const std::size_t elements = block.elements(plane);
      // Where zstd would be called, zeros stand for what it gives.
      opened.inflated.push_back(
          stream.nbytes == elements
              ? Buffer(record.data() + stream.offset, record.data() + stream.offset + stream.nbytes)
              : Buffer(elements));
    }
  }
  expect(at == stored.size(), "open_planes lists the streams of split planes");
  for (const Buffer& stream : opened.inflated) {
    opened.streams.emplace_back(stream.data(), stream.size());
  }
  return opened;
}

/// Consecutive planes: from `first` on, below `end`.
struct PlaneRange {
  std::size_t first;
  std::size_t end;
};

/// The wanted rows of some planes, without gaps. Earlier planes stay in the part, later ones do
/// not.
Buffer decode_window(const Opened& opened, const Window& window, const PlaneRange& planes) {
  const std::size_t num_leading = planes.first;
  std::vector<std::size_t> offsets;
  std::size_t total = 0;
  for (std::size_t plane = num_leading; plane < planes.end; ++plane) {
    offsets.push_back(total);
    total += window.num_heads * window.num_tokens * opened.block.geometry.row_nbytes(plane);
  }
  static Guarded guarded;
  const Bytes out = guarded.room(total, 0xA5);
  std::vector<TargetRows> targets;
  for (std::size_t at = 0; at < offsets.size(); ++at) {
    const std::size_t row = opened.block.geometry.row_nbytes(num_leading + at);
    targets.push_back(TargetRows{out.data() + offsets[at],
                                 static_cast<std::ptrdiff_t>(row * window.num_tokens),
                                 static_cast<std::ptrdiff_t>(row)});
  }
  RecordPart part = opened.part;
  part.num_leading = num_leading;
  part.planes.resize(planes.end);
  decode_planes(opened.block, part, opened.streams, opened.calibration.get(), window, targets);
  return Buffer(out.data(), out.data() + out.size());
}

Buffer cut_window(const Opened& opened,
                  const Buffer& all,
                  const Window& window,
                  const PlaneRange& planes) {
  Buffer out;
  const std::uint8_t* plane_begin = all.data();
  for (std::size_t plane = 0; plane < planes.end; ++plane) {
    const std::size_t row = opened.block.geometry.row_nbytes(plane);
    for (std::size_t h = window.first_head;
         plane >= planes.first && h < window.first_head + window.num_heads; ++h) {
      const std::uint8_t* rows =
          plane_begin + (h * opened.info.num_tokens + window.first_token) * row;
      out.insert(out.end(), rows, rows + window.num_tokens * row);
    }
    plane_begin += opened.info.kv_heads * opened.info.num_tokens * row;
  }
  return out;
}

/// Four bytes that are as good as random: the header's checksum.
std::uint64_t chooser_of(const Sample& sample) {
  std::uint64_t chooser = 0;
  std::memcpy(&chooser, sample.record.data() + 8, 4);
  return chooser;
}

/// All planes of some layers that the record's own bytes choose; all layers where one would not do,
/// as streams are listed for all.
PlaneRange some_layers(const Opened& opened, const Sample& sample) {
  const std::size_t layers = opened.info.num_layers;
  if (!opened.streams.empty()) {
    return PlaneRange{0, 2 * layers};
  }
  const std::uint64_t chooser = chooser_of(sample);
  const std::size_t first = (chooser >> 24U) % layers;
  return PlaneRange{2 * first, 2 * (first + 1 + (chooser >> 28U) % (layers - first))};
}

/// A window that the record's own bytes choose.
Window some_window(const Opened& opened, const Sample& sample) {
  const std::uint64_t chooser = chooser_of(sample);
  const std::size_t heads = opened.info.kv_heads;
  const std::size_t tokens = opened.info.num_tokens;
  const std::size_t head = chooser % heads;
  const std::size_t token = (chooser >> 8U) % tokens;
  return Window{head, 1 + (chooser >> 16U) % (heads - head), token,
                1 + (chooser >> 20U) % (tokens - token)};
}

template <typename Decode>
Outcome outcome_of(const Decode& run) {
  try {
    std::optional<Buffer> slot = run();
    return slot ? Outcome{Verdict::kDecoded, std::move(*slot)} : Outcome{Verdict::kTooLarge, {}};
  } catch (const CorruptRecord&) {
    return Outcome{Verdict::kCorrupt, {}};
  } catch (const UnsupportedFormat&) {
    return Outcome{Verdict::kUnsupported, {}};
  }
}

std::optional<Buffer> decode_all(const Sample& sample) {
  const std::optional<Opened> opened = open(sample);
  if (!opened) {
    return std::nullopt;
  }
  const Window all{0, opened->info.kv_heads, 0, opened->info.num_tokens};
  return decode_window(*opened, all, PlaneRange{0, opened->info.planes.size()});
}

}  // namespace

Outcome decode_at(const Sample& sample, SimdLevel level) {
  limit_simd(level);
  return outcome_of([&sample] { return decode_all(sample); });
}

void probe(ConstBytes data) {
  // A copy of exactly this size, so that an address checker sees each byte too many.
  const Buffer copy(data.data(), data.data() + data.size());
  static_cast<void>(outcome_of([&copy]() -> std::optional<Buffer> {
    const RecordInfo info = parse_header(ConstBytes{copy.data(), copy.size()});
    expect(info.planes.size() == 2 * info.num_layers && info.num_layers > 0,
           "an accepted header has two planes a layer");
    expect(info.header_nbytes() <= copy.size(), "an accepted header is there");
    return std::nullopt;
  }));
}

Outcome decode_sealed(ConstBytes data) {
  Sample sample = Sample::from(data);
  sample.seal();
  std::optional<Outcome> first;
  at_all_levels([&](SimdLevel level) {
    Outcome outcome = decode_at(sample, level);
    if (!first) {
      first = std::move(outcome);
      return;
    }
    expect(outcome == *first, "all levels decode alike");
  });
  if (first->verdict == Verdict::kDecoded) {
    const std::optional<Opened> opened = open(sample);
    const Window window = some_window(*opened, sample);
    const PlaneRange layers = some_layers(*opened, sample);
    const Buffer wanted = cut_window(*opened, first->slot, window, layers);
    at_all_levels([&](SimdLevel) {
      expect(decode_window(*opened, window, layers) == wanted,
             "a window of some layers decodes as the whole does");
    });
  }
  return std::move(*first);
}

void decode(ConstBytes data) { static_cast<void>(decode_sealed(data)); }

void calibration(ConstBytes data) {
  Buffer object(data.data(), data.data() + data.size());
  seal_calibration(object);
  static_cast<void>(outcome_of([&object]() -> std::optional<Buffer> {
    const Calibration parsed(ConstBytes{object.data(), object.size()}, CalibrationId{1});
    for (std::size_t plane = 0; plane < 2 * parsed.num_layers(); ++plane) {
      const std::size_t dim = plane % 2 == 0 ? parsed.key_dim() : parsed.value_dim();
      expect(parsed.plane(plane).log_rms.size() == parsed.kv_heads() &&
                 parsed.plane(plane).mean.size() == parsed.kv_heads() * dim,
             "an accepted calibration has all its channels");
    }
    return std::nullopt;
  }));
}

}  // namespace kv::fuzz
