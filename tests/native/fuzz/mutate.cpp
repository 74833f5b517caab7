// SPDX-License-Identifier: Apache-2.0
// Replays a corpus without libFuzzer, then mutates it: `mutate CORPUS NUM_MUTANTS [SEED]`.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "fuzz/targets.hpp"

namespace {

using kv::fuzz::Buffer;
using kv::fuzz::expect;
using kv::fuzz::Outcome;
using kv::fuzz::Sample;
using kv::fuzz::Verdict;
using Random = std::mt19937_64;

struct NamedTarget {
  const char* folder;
  kv::fuzz::Target* run;
};

constexpr std::array<NamedTarget, 4> kTargets = {{{"probe", &kv::fuzz::probe},
                                                  {"decode", &kv::fuzz::decode},
                                                  {"round_trip", &kv::fuzz::round_trip},
                                                  {"calibration", &kv::fuzz::calibration}}};

kv::ConstBytes view(const Buffer& buffer) { return {buffer.data(), buffer.size()}; }

std::vector<Buffer> read_folder(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> paths;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    paths.push_back(file.path());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Buffer> all;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    all.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return all;
}

std::size_t below(Random& random, std::size_t limit) { return random() % limit; }

void mutate_once(Buffer& bytes, Random& random) {
  if (bytes.empty()) {
    return;
  }
  // Half of all changes go where the fields are.
  const std::size_t reach =
      random() % 2 == 0 ? std::min<std::size_t>(bytes.size(), 160) : bytes.size();
  const std::size_t at = below(random, reach);
  switch (below(random, 7)) {
    case 0:
      bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ (1U << below(random, 8)));
      break;
    case 1:
      bytes[at] = static_cast<std::uint8_t>(random());
      break;
    case 2: {
      constexpr std::array<std::uint32_t, 10> kEdges = {
          0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
      const std::uint32_t edge = kEdges[below(random, kEdges.size())];
      std::memcpy(bytes.data() + at, &edge, std::min<std::size_t>(4, bytes.size() - at));
      break;
    }
    case 3:
      bytes[at] = static_cast<std::uint8_t>(bytes[at] + (random() % 2 == 0 ? 1 : 255));
      break;
    case 4: {
      const std::size_t from = below(random, bytes.size());
      const std::size_t nbytes =
          below(random, 1 + std::min<std::size_t>(32, bytes.size() - std::max(at, from)));
      std::memmove(bytes.data() + at, bytes.data() + from, nbytes);
      break;
    }
    case 5:
      bytes.resize(random() % 8 == 0 ? below(random, bytes.size()) : bytes.size());
      break;
    default:
      if (random() % 8 == 0) {
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), 1 + below(random, 16),
                     static_cast<std::uint8_t>(random()));
      }
      break;
  }
}

Buffer mutated(const Buffer& original, Random& random) {
  Buffer bytes = original;
  for (std::size_t left = 1 + below(random, 6); left > 0; --left) {
    mutate_once(bytes, random);
  }
  return bytes;
}

/// Nothing is sealed: the mutant is refused, or gives what the original gives.
void decode_unsealed(const Buffer& original, const Buffer& mutant) {
  constexpr auto kHighest = kv::SimdLevel::kAvx512;
  const Sample sample = Sample::from(view(mutant));
  const Outcome outcome = decode_at(sample, kHighest);
  if (outcome.verdict == Verdict::kDecoded) {
    const Sample intact = Sample::from(view(original));
    // Another calibration object may stand before an intact record: then its id would not fit.
    expect(sample.calibration != intact.calibration || outcome == decode_at(intact, kHighest),
           "damage is refused or harmless");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s CORPUS NUM_MUTANTS [SEED]\n", argv[0]);
    return 2;
  }
  const std::filesystem::path corpus = argv[1];
  const std::size_t wanted = std::stoull(argv[2]);
  Random random(argc > 3 ? std::stoull(argv[3]) : 1);

  std::array<std::vector<Buffer>, kTargets.size()> seeds;
  for (std::size_t t = 0; t < kTargets.size(); ++t) {
    seeds[t] = read_folder(corpus / kTargets[t].folder);
    expect(!seeds[t].empty(), "there is a corpus for each target");
    for (const Buffer& seed : seeds[t]) {
      kTargets[t].run(view(seed));
    }
    std::printf("%s: %zu replayed\n", kTargets[t].folder, seeds[t].size());
  }

  const auto begin = std::chrono::steady_clock::now();
  std::array<std::size_t, 4> verdicts{};
  for (std::size_t done = 0; done < wanted; ++done) {
    // Records are what the driver is for; every eighth mutant goes to another target.
    const std::size_t t = done % 8 == 0 ? done / 8 % kTargets.size() : 1;
    const Buffer& original = seeds[t][below(random, seeds[t].size())];
    const Buffer mutant = mutated(original, random);
    kTargets[t].run(view(mutant));
    if (t == 1) {
      decode_unsealed(original, mutant);
      Sample sealed = Sample::from(view(mutant));
      sealed.seal();
      ++verdicts[static_cast<std::size_t>(decode_at(sealed, kv::SimdLevel::kAvx512).verdict)];
    }
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::printf(
      "%zu mutants; sealed records: %zu decoded, %zu corrupt, %zu unsupported, %zu too large; %.1f "
      "s\n",
      wanted, verdicts[0], verdicts[1], verdicts[2], verdicts[3], took.count());
  return 0;
}
