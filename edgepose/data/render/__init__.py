"""Rendered people with exact keypoints: articulated bodies with volume, clothes, light and clutter, in NumPy.

`skeleton` poses joints, `body` puts cones and clothes on them, `raster` draws the cones into a z-buffer, `texture`,
`shade` and `scene` colour them and what is around, `person` puts it together, `dataset` writes COCO keypoint JSON.

Invariant: all randomness comes from the generator or the seed that is passed in.
"""

from __future__ import annotations

from edgepose.data.render.dataset import write_coco
from edgepose.data.render.person import RenderConfig, RenderedPerson, render_person
from edgepose.data.render.skeleton import LSP14

__all__ = ["LSP14", "RenderConfig", "RenderedPerson", "render_person", "write_coco"]
