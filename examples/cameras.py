"""Several cameras, one network: `python examples/cameras.py small.bundle 0 rtsp://door/stream match.mp4`.

Each source gets a thread and a tracker of its own; they share the estimator, which infers one frame after the other.
Of a camera the latest frame is taken, so that a slow network falls behind by frames, never by seconds.
"""

from __future__ import annotations

import sys
import threading
from itertools import islice

from edgepose import PoseEstimator, PoseTracker
from edgepose.video.sources import open_source, shots

_FRAMES = 200  # of each source; a real program would have no end


def watch(estimator: PoseEstimator, address: str) -> None:
    source, tracker = open_source(address), PoseTracker(estimator)
    seen: set[int] = set()
    for shot in islice(shots(source), _FRAMES):
        poses = tracker(shot.frame, shot.time_s)
        seen |= set(poses.ids.tolist()) if poses.ids is not None else set()
    dropped = f", {source.live.dropped} frames dropped" if source.live is not None else ""
    print(f"{source.name}: {len(seen)} people{dropped}", flush=True)


def main(bundle: str, *addresses: str) -> None:
    with PoseEstimator.from_bundle(bundle) as estimator:
        threads = [threading.Thread(target=watch, args=(estimator, address)) for address in addresses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
