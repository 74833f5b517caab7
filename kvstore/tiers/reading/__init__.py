# SPDX-License-Identifier: Apache-2.0
"""The way from disk: plans, transfers, decoding, verification."""
