# SPDX-License-Identifier: Apache-2.0
"""Late interaction over the blocks of a stream: their keys, the stored pieces of its index, the ranking."""
