"""Measuring the figures that edgepose claims: one script per question, never part of the tests.

Invariant: nothing in the package `edgepose` knows of this folder.
"""
