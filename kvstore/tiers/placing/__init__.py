# SPDX-License-Identifier: Apache-2.0
"""Where extents go: free ranges of files, files of folders, folders of drives."""
