# SPDX-License-Identifier: Apache-2.0
"""Batches on their way: tickets, the block store's face of a folder, memory alone, prefetch."""
