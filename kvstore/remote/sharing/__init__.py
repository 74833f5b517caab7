# SPDX-License-Identifier: Apache-2.0
"""Sharing streams through a server: pushing, pulling, and what lies on the server in between."""
