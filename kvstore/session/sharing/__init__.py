# SPDX-License-Identifier: Apache-2.0
"""What a stream takes over from others of its store, before a model goes on with it."""
