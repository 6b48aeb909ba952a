"""`python -m leanlift.cli`."""

import sys

from leanlift.cli import script

sys.exit(script())
