# SPDX-License-Identifier: Apache-2.0
"""From a video file to frames, text and speech, each decoder behind one module."""
