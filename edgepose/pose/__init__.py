"""Pure functions over arrays: crops, encoding and decoding of keypoints, post-processing, metrics, drawing.

Invariant: nothing here keeps state, and nothing here imports a runtime or a training library.
"""
