"""Comparisons at equal privacy: a grid of runs, their records, and a report built from run cards alone."""
