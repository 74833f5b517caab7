# SPDX-License-Identifier: Apache-2.0
"""Contexts: streams that were read apart and are asked about together, in one session."""
