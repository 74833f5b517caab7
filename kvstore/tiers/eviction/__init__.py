# SPDX-License-Identifier: Apache-2.0
"""Who leaves a full tier, and who is let in: policies that know keys and move nothing."""
