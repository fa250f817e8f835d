"""``python -m fd_minicpm41.cli``: the same as the command ``fd-minicpm41``."""

import sys

from fd_minicpm41.cli import main

sys.exit(main())
