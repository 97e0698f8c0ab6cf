"""Timing: processes that take turns, the worker in each of them, and what it times."""
