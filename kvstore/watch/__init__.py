# SPDX-License-Identifier: Apache-2.0
"""For those who watch a store from outside: Prometheus, and other processes."""
