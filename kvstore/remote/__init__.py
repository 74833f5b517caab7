# SPDX-License-Identifier: Apache-2.0
"""Remote tier: blocks and streams on servers that several machines share; best effort, never the durable copy."""
