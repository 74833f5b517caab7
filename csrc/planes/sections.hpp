// SPDX-License-Identifier: Apache-2.0
// Where the sections of an entropy-coded plane lie (FORMAT.md sections 5 and 6.4): the one place
// that believes a plane's own numbers, after checking them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "entropy/adaptive_tables.hpp"
#include "planes/parameters.hpp"
#include "planes/plane.hpp"

namespace kv {

/// Takes sections from the front of a plane whose lengths are not trusted.
class SectionWalk {
 public:
  SectionWalk(std::size_t plane, ConstBytes stored) : plane_(plane), stored_(stored) {}

  [[nodiscard]] ConstBytes take(std::uint64_t nbytes) {
    const std::uint64_t padded = round_up(nbytes, kSectionAlignment);
    KV_EXPECT(fits(at_, padded, stored_.size()), CorruptRecord,
              plane_name(plane_) + " has sections that do not fit it");
    const ConstBytes taken = stored_.sub(at_, nbytes);
    at_ += padded;
    return taken;
  }
  [[nodiscard]] ConstBytes rest() const { return stored_.sub(at_, stored_.size() - at_); }
  void expect_end() const {
    KV_EXPECT(at_ == stored_.size(), CorruptRecord,
              plane_name(plane_) + " has bytes that belong to no section");
  }

 private:
  std::size_t plane_;
  ConstBytes stored_;
  std::uint64_t at_ = 0;
};

/// A plane of coding exponent; views and pointers are into the stored bytes.
struct ExponentSections {
  std::vector<std::uint8_t> chosen;  ///< [heads, dim]: the table of a channel
  std::vector<AdaptiveTable> tables;
  const std::uint8_t* lows;          ///< itemsize - 1 streams of all elements
  std::vector<ConstBytes> segments;  ///< states and words
};

/// One segment of a quantised plane.
struct StoredSegment {
  ConstBytes states;
  ConstBytes words;
  const std::uint8_t* indices;
  const std::uint8_t* bits;
  std::size_t num_exceptions;
};

/// A plane of coding quantised; pointers are into the stored bytes, and null for what it has not.
struct QuantisedSections {
  PlaneParameters inline_parameters;          ///< only where they are in-line
  const std::uint8_t* scale_bases = nullptr;  ///< i16 [heads], in range
  const std::uint8_t* scales = nullptr;       ///< u8 [heads, coded tokens]
  const std::uint8_t* raw = nullptr;          ///< [heads, raw rows, dim]
  const std::uint8_t* lows = nullptr;  ///< [heads, coded tokens, low bits, low_row_nbytes(dim)]
  std::vector<StoredSegment> segments;
};

/// Both: `entry` is checked against `shape`, `stored` has a matching checksum and is not trusted
/// otherwise. @throws CorruptRecord that names the plane.
[[nodiscard]] ExponentSections find_exponent_sections(std::size_t plane,
                                                      const PlaneShape& shape,
                                                      const PlaneEntry& entry,
                                                      ConstBytes stored);
[[nodiscard]] QuantisedSections find_quantised_sections(std::size_t plane,
                                                        const PlaneShape& shape,
                                                        const PlaneEntry& entry,
                                                        ConstBytes stored);

}  // namespace kv
