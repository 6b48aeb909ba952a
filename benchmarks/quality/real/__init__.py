"""Quality on weights that somebody really trained: `python -m benchmarks.quality --preset real`.

Every method starts from the same checkpoint, sees the same rows in the same order, and is measured
on the same tokens, whose losses are kept row by row: so a difference of two methods has a standard
error of its own, far below that of either. What is asked and what decides is in the README beside
this package, written down before the runs.
"""
