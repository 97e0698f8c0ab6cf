"""Poses of the people in a photograph, drawn: `python examples/image.py small.bundle photo.jpg drawn.jpg`.

The first start with a bundle measures which of its engines is fastest here; later ones remember.
"""

from __future__ import annotations

import sys

import cv2

from edgepose import PoseEstimator
from edgepose.pose.draw import draw


def main(bundle: str, photo: str, out: str) -> None:
    frame = cv2.imread(photo)
    if frame is None:
        sys.exit(f"{photo}: no photograph")
    with PoseEstimator.from_bundle(bundle) as estimator:
        poses = estimator(frame)  # the whole frame is one person; pass boxes where there are several
        print(f"{len(poses)} people by {poses.backend}")
        cv2.imwrite(out, draw(frame, poses, estimator.spec.keypoints))


if __name__ == "__main__":
    main(*sys.argv[1:4])
