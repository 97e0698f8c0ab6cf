"""Labelled people: the COCO-keypoints reader, rendered people, augmentation and occlusion, corruptions for tests.

Invariant: `coco` and `corrupt` need NumPy and OpenCV only, so that accuracy can be measured on a device without a
training library.
"""
