"""``python -m experiments`` is ``tats``."""

import sys

from experiments.cli import main

sys.exit(main())
