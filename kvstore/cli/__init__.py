# SPDX-License-Identifier: Apache-2.0
"""The kvstore command: argument parsing and printing over the store and its videos."""
