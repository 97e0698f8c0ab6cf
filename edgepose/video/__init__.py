"""Frames in and out: photographs, folders of them, videos, cameras, streams.

Invariant: every frame that is read has a name and, in whatever has time, a number and a time; whatever is written
appears under its name only when all of it is there.
"""
