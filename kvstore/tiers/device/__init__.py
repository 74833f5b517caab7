# SPDX-License-Identifier: Apache-2.0
"""Device tier: slots where attention reads them, the way there, and coding on the device itself."""
