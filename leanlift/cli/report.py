"""`leanlift report RUN ...`: one run as text or as a page, several side by side."""

from __future__ import annotations

import argparse
import json

from leanlift.errors import UserError
from leanlift.io.measured import load_report


def report_command(options: argparse.Namespace) -> int:
    """Show one run, or compare several."""
    from leanlift.report.data import read_run

    if options.html is not None and (len(options.runs) > 1 or options.json):
        instead = "leave --json out" if options.json else "give one RUN"
        raise UserError(f"--html makes the page of one run: {instead}.")
    if options.json and len(options.runs) == 1:
        print(json.dumps(load_report(options.runs[0]), indent=2))
        return 0
    with_offsets = options.html is not None  # what they are like is shown by the page alone
    runs = [read_run(run, with_offsets) for run in options.runs]
    if len(runs) > 1:
        from leanlift.report.compare import compare_runs, compare_text

        print(json.dumps(compare_runs(runs), indent=2) if options.json else compare_text(runs))
        return 0
    if options.html is not None:
        from leanlift.report.page import write_page

        print(f"Wrote {write_page(runs[0], options.html or None)}: open it in any browser.")
        return 0
    from leanlift.report.text import report_text

    print(report_text(runs[0]))
    return 0
