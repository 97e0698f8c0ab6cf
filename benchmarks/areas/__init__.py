"""The claims, one file per area; each holds CLAIMS, a tuple of `Claim`, named "area.what" after the file.

Invariant: importing an area loads no builder and no backend: names are checked before anything heavy is imported.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from benchmarks.claim import Claim


def all_claims() -> tuple[Claim, ...]:
    """The claims of every file in this folder, area by area."""
    claims: list[Claim] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        claims += import_module(f"{__name__}.{module.name}").CLAIMS
    return tuple(claims)
