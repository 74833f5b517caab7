# SPDX-License-Identifier: Apache-2.0
"""A stream attached to a running model: what it attends to, what it stores, what a question finds."""
