// SPDX-License-Identifier: Apache-2.0
// Joins neighbouring copies.
#include "core/device.hpp"

namespace kv::device {

std::vector<CopyRun> coalesce(const std::vector<CopyRun>& runs) {
  std::vector<CopyRun> joined;
  joined.reserve(runs.size());
  for (const CopyRun& run : runs) {
    if (run.nbytes == 0) {
      continue;
    }
    if (!joined.empty()) {
      CopyRun& last = joined.back();
      if (last.host_offset + last.nbytes == run.host_offset &&
          last.device_offset + last.nbytes == run.device_offset) {
        last.nbytes += run.nbytes;
        continue;
      }
    }
    joined.push_back(run);
  }
  return joined;
}

}  // namespace kv::device
