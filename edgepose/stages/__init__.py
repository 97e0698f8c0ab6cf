"""The stages of a compile: each turns one artefact into the next and says what it did.

Invariant: a stage is a function of its inputs' digests, its config and its tools' versions; that is its key, and an
artefact under that key is never made twice.
"""
