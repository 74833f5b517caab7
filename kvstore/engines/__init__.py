# SPDX-License-Identifier: Apache-2.0
"""Adapters to inference engines, one module each; nothing is imported here, so an absent engine costs nothing."""
