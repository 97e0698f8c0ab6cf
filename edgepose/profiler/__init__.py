"""Measuring engines and judging whether a candidate is worse than a baseline.

Invariant: nothing here knows how an engine was made, and importing this package loads nothing heavier than NumPy.
"""
