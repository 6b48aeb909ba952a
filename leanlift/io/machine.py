"""What this machine has, as far as its system tells."""

from __future__ import annotations

import os


def machine_nbytes() -> int | None:
    """The machine's memory; None where this system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
