# SPDX-License-Identifier: Apache-2.0
"""`python -m kvstore`: the kvstore command without its installed script."""

from __future__ import annotations

import sys

from kvstore.cli.main import main

sys.exit(main())
