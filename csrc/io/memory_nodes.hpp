// SPDX-License-Identifier: Apache-2.0
// Where memory lies: spread over the machine's NUMA nodes, and present before it is used.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/span.hpp"

namespace kv {

/// Numbers in a list as the kernel writes it, such as "0-1,3"; none when it is not such a list.
[[nodiscard]] std::vector<unsigned> parse_nodes(const std::string& list);

/// Asks that the pages of `memory` be taken from all nodes in turn, so that no node's memory is
/// full first and the reads of all cores share all controllers. Must come before the first touch.
/// Does nothing on machines of one node, and where the kernel refuses: pages then lie where they
/// are first touched.
void interleave(Bytes memory) noexcept;

/// Makes all pages of zero-filled `memory` present, by up to `num_threads` threads: clearing
/// hundreds of gigabytes takes one alone minutes.
void touch(Bytes memory, std::size_t num_threads);

}  // namespace kv
