# SPDX-License-Identifier: Apache-2.0
"""The tables of the catalogue: packed values, and the operations that keep them consistent."""
