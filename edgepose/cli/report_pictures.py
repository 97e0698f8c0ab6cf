"""The photographs on which the compressed network is worst: labels, reference and compressed network side by side.

Invariant: the pictures show what the records say; no network runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import Person, PoseDataset, read_image
from edgepose.errors import ImageError
from edgepose.pose.draw import draw
from edgepose.profiler.accuracy import AccuracyRecord
from edgepose.profiler.pages.report import Picture
from edgepose.profiler.waterfall import Waterfall, Worst, worst_persons
from edgepose.spec import Keypoints, Poses

_SIDE_PX = 300  # of a panel
_PADDING = 1.5  # the person's box, made so many times larger
_QUALITY = 80


@dataclass(frozen=True, slots=True)
class WorstPeople:
    """The same persons as pictures and as numbers.

    Attributes:
        pictures: For the page.
        rows: For JSON: who it is, both errors, and where labels and networks put each joint, pixels of the photograph.
    """

    pictures: tuple[Picture, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()


def worst_people(found: Waterfall, people: PoseDataset, records: dict[str, AccuracyRecord], count: int) -> WorstPeople:
    """The persons whom the compressed network finds worse than the reference does, worst first.

    Args:
        found: Says which two steps are compared.
        people: Who was measured.
        records: Predictions by name of a step.
        count: How many at most.

    Raises:
        ImageError: A photograph cannot be read.
    """
    if not found.reference or not found.compressed:
        return WorstPeople()
    names = found.step(found.reference).title, found.step(found.compressed).title
    arms = records[found.reference], records[found.compressed]
    worst = worst_persons(*arms, count)
    return WorstPeople(
        tuple(_picture(one, people.persons[one.row], arms, names, people.keypoints) for one in worst),
        tuple(_row(one, people.persons[one.row], arms) for one in worst),
    )


def _picture(
    worst: Worst,
    person: Person,
    arms: tuple[AccuracyRecord, AccuracyRecord],
    names: tuple[str, str],
    keypoints: Keypoints,
) -> Picture:
    crop, view = _crop(read_image(person.image), person)
    truth = np.where(person.keypoints[:, 2:] > 0, person.keypoints[:, :2], np.nan)
    panels = [("labels", _panel(crop, view, truth, np.ones(len(truth)), keypoints))]
    for name, record in zip(names, arms, strict=True):
        drawn = _panel(crop, view, record.predicted[worst.row], record.scores[worst.row], keypoints)
        panels.append((name, drawn))
    caption = (
        f"{person.image.name}, annotation {person.annotation_id}: mean error {100 * worst.reference:.1f} % of the "
        f"person before, {100 * worst.compressed:.1f} % after (a joint counts 50 % at most)"
    )
    return Picture(caption, panels)


def _crop(frame: NDArray[np.uint8], person: Person) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A square around the person, (side, side, 3) uint8 BGR, and the (2, 3) map to it from the photograph."""
    x, y, width, height = person.bbox_xywh
    scale = _SIDE_PX / (_PADDING * max(width, height))
    view = np.array(
        [[scale, 0.0, _SIDE_PX / 2 - scale * (x + width / 2)], [0.0, scale, _SIDE_PX / 2 - scale * (y + height / 2)]]
    )
    crop = cv2.warpAffine(frame, view, (_SIDE_PX, _SIDE_PX), flags=cv2.INTER_LINEAR, borderValue=(60, 60, 60))
    return np.asarray(crop, np.uint8), view


def _panel(
    crop: NDArray[np.uint8],
    view: NDArray[np.float64],
    points: NDArray[np.floating[Any]],
    scores: NDArray[np.floating[Any]],
    keypoints: Keypoints,
) -> bytes:
    places = (points @ view[:, :2].T + view[:, 2]).astype(np.float32)
    box = np.array([[0, 0, _SIDE_PX, _SIDE_PX]], np.float32)
    picture = draw(crop, Poses(places[None], scores[None].astype(np.float32), box), keypoints, min_score=0.0)
    done, content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ImageError("report: picture", found=f"{picture.shape}, which cannot be encoded as JPEG")
    return content.tobytes()


def _row(worst: Worst, person: Person, arms: tuple[AccuracyRecord, AccuracyRecord]) -> dict[str, Any]:
    reference, compressed = (record.predicted[worst.row] for record in arms)
    return {
        "image": person.image.name,
        "annotation_id": person.annotation_id,
        "error_reference": worst.reference,
        "error_compressed": worst.compressed,
        "labels_px": person.keypoints,
        "reference_px": reference,
        "compressed_px": compressed,
    }
