"""``python -m kfac_fast``: configuration and self-test; exit code 1 when the self-test fails."""

import sys

from .diagnostics import main

sys.exit(main())
