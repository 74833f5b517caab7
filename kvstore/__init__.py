# SPDX-License-Identifier: Apache-2.0
"""Owns the life of KV cache blocks outside the attention kernel."""
