# SPDX-License-Identifier: Apache-2.0
"""Keeping a store in order: moving records as they are, repair, compaction, export and import."""
