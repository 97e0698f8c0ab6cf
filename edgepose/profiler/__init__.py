"""Measuring engines and judging whether a candidate is worse than a baseline.

`accuracy` and `slices` predict over people, `edgepose.timing` takes turns with engines, `facts` reads files. `gate`
judges what they find, `history` what a series of judgements adds up to, `waterfall` what each step of a
compression cost, `pages` shows it all. `edgepose.stats` has the bounds that all of them go by.

Invariant: nothing here knows how an engine was made, and importing this package loads nothing heavier than NumPy.
"""
