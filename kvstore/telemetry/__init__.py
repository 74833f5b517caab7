# SPDX-License-Identifier: Apache-2.0
"""What all parts use to tell how they fare: histograms, log lines of faults, spans."""
