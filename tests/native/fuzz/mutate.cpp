// SPDX-License-Identifier: Apache-2.0
// Replays a corpus without libFuzzer, then mutates it: `mutate CORPUS NUM_MUTANTS [SEED [FIRST]]`.
// Mutants before FIRST are made and not run: to go on, or to find the one that ended a run.
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

constexpr std::size_t kProbe = 0;
constexpr std::size_t kDecode = 1;
constexpr std::size_t kRoundTrip = 2;
constexpr std::size_t kCalibration = 3;

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

/// Where a change goes: half of all to the fields, which `fields_at` begin or the whole does.
std::size_t some_place(const Buffer& bytes, std::size_t fields_at, Random& random) {
  if (random() % 2 == 0) {
    return below(random, bytes.size());
  }
  const std::size_t first = random() % 2 == 0 && fields_at < bytes.size() ? fields_at : 0;
  return first + below(random, std::min<std::size_t>(bytes.size() - first, 160));
}

void mutate_once(Buffer& bytes, std::size_t fields_at, Random& random) {
  if (bytes.empty()) {
    return;
  }
  const std::size_t at = some_place(bytes, fields_at, random);
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

Buffer mutated(const Buffer& original, std::size_t fields_at, Random& random) {
  Buffer bytes = original;
  for (std::size_t left = 1 + below(random, 6); left > 0; --left) {
    mutate_once(bytes, fields_at, random);
  }
  return bytes;
}

std::size_t record_at(const Buffer& sample) {
  return sample.size() - Sample::from(view(sample)).record.size();
}

/// Nothing is sealed: the mutant is refused, or gives what the plain loops make of the original.
Verdict decode_unsealed(const Buffer& original, const Buffer& mutant, kv::SimdLevel level) {
  const Sample sample = Sample::from(view(mutant));
  const Outcome outcome = decode_at(sample, level);
  if (outcome.verdict == Verdict::kDecoded) {
    const Sample intact = Sample::from(view(original));
    // Another calibration object may stand before an intact record: then its id would not fit.
    expect(sample.calibration != intact.calibration ||
               outcome == decode_at(intact, kv::SimdLevel::kBaseline),
           "damage is refused or harmless");
  }
  return outcome.verdict;
}

struct Progress {
  std::size_t mutants = 0;
  std::array<std::size_t, 4> sealed{};
  std::array<std::size_t, 4> unsealed{};
  std::size_t round_trips = 0;

  void print(double took_s) const {
    std::printf(
        "%zu mutants; sealed records, alike at all levels: %zu decoded, %zu corrupt, %zu "
        "unsupported, %zu too large; unsealed: %zu refused, %zu harmless; %zu round trips; %.0f "
        "s\n",
        mutants, sealed[0], sealed[1], sealed[2], sealed[3], unsealed[1] + unsealed[2],
        unsealed[0] + unsealed[3], round_trips, took_s);
    std::fflush(stdout);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s CORPUS NUM_MUTANTS [SEED [FIRST]]\n", argv[0]);
    return 2;
  }
  const std::filesystem::path corpus = argv[1];
  const std::size_t wanted = std::stoull(argv[2]);
  Random random(argc > 3 ? std::stoull(argv[3]) : 1);

  const std::size_t first = argc > 4 ? std::stoull(argv[4]) : 0;

  std::array<std::vector<Buffer>, kTargets.size()> seeds;
  for (std::size_t t = 0; t < kTargets.size(); ++t) {
    seeds[t] = read_folder(corpus / kTargets[t].folder);
    expect(!seeds[t].empty(), "there is a corpus for each target");
    for (const Buffer& seed : seeds[t]) {
      kTargets[t].run(view(seed));
    }
    std::printf("%s: %zu replayed\n", kTargets[t].folder, seeds[t].size());
  }

  const int highest = static_cast<int>(kv::cpu_features().simd_level);
  std::printf("SIMD levels compared: %d of 3\n", highest + 1);
  std::fflush(stdout);
  const auto begin = std::chrono::steady_clock::now();
  const auto took_s = [&begin] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  Progress progress;
  for (; progress.mutants < wanted; ++progress.mutants) {
    if (progress.mutants > 0 && progress.mutants % 50000 == 0) {
      progress.print(took_s());
    }
    // Records are what the driver is for; every fourth mutant goes to another target.
    constexpr std::array<std::size_t, 4> kOthers = {kRoundTrip, kProbe, kRoundTrip, kCalibration};
    const std::size_t turn = progress.mutants / 4;
    const std::size_t t = progress.mutants % 4 == 0 ? kOthers[turn % kOthers.size()] : kDecode;
    const Buffer& original = seeds[t][below(random, seeds[t].size())];
    const Buffer mutant = mutated(original, t == kDecode ? record_at(original) : 0, random);
    if (progress.mutants < first) {
      continue;
    }
    if (t == kDecode) {
      ++progress.sealed[static_cast<std::size_t>(kv::fuzz::decode_sealed(view(mutant)).verdict)];
      const auto level = static_cast<kv::SimdLevel>(static_cast<int>(turn) % (highest + 1));
      ++progress.unsealed[static_cast<std::size_t>(decode_unsealed(original, mutant, level))];
    } else {
      kTargets[t].run(view(mutant));
      progress.round_trips += t == kRoundTrip ? 1 : 0;
    }
  }
  progress.print(took_s());
  return 0;
}
