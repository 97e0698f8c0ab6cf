"""Labelled people: the COCO-keypoints reader, rendered people, augmentation.

Invariant: `coco` needs NumPy and OpenCV only, so that accuracy can be measured on a device without a training library.
"""
