# SPDX-License-Identifier: Apache-2.0
"""The way to disk: queue, batches, records."""
