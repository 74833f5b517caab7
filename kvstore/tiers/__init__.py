# SPDX-License-Identifier: Apache-2.0
"""Tiers: one medium each (device, host, disk), and the disk tier's catalogue and extents."""
