# SPDX-License-Identifier: Apache-2.0
"""Tokens of stored blocks, brought together for attention: all that a layer reads, or only what changed."""
