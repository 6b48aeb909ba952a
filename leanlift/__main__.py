"""`python -m leanlift`: the command `leanlift`."""

import sys

from leanlift.cli import script

sys.exit(script())
