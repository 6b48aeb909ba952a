"""Measurements: one file per claim, results as CSV in results/."""
