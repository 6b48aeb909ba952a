"""`python -m leanlift.cli`."""

import sys

from leanlift.cli import main

sys.exit(main())
