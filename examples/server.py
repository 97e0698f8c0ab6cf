"""Poses over HTTP with FastAPI: `uvicorn server:app --app-dir examples`, then POST a JPEG to /poses.

`EDGEPOSE_BUNDLE` names the bundle; POST /reload?bundle=PATH puts another one into service without losing a request.
Needs `pip install fastapi uvicorn` beside edgepose.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import cv2
import numpy as np
from fastapi import FastAPI, HTTPException, Request

from edgepose import EdgeposeError, PoseEstimator


@asynccontextmanager
async def lifespan(served: FastAPI) -> AsyncIterator[None]:
    """One estimator for the life of the server; loading it must not stop the event loop either."""
    bundle = os.environ["EDGEPOSE_BUNDLE"]
    served.state.estimator = await asyncio.to_thread(PoseEstimator.from_bundle, bundle)
    yield
    served.state.estimator.close()


app = FastAPI(lifespan=lifespan)


@app.post("/poses")
async def poses(request: Request) -> dict[str, Any]:
    """Keypoints in pixels of the picture, of one person who fills it."""
    frame = cv2.imdecode(np.frombuffer(await request.body(), np.uint8), cv2.IMREAD_COLOR)
    if frame is None:
        raise HTTPException(415, "no picture")
    # Cropping and decoding of one request overlap with the inference of another.
    found = await asyncio.wrap_future(await asyncio.to_thread(app.state.estimator.submit, frame))
    people = [
        {"keypoints": k.tolist(), "scores": s.tolist()} for k, s in zip(found.keypoints, found.scores, strict=True)
    ]
    return {"people": people, "backend": found.backend, "degraded": found.degraded}


@app.post("/reload")
async def reload(bundle: str) -> dict[str, str]:
    """Another bundle, once it has answered its golden inputs; requests go on being answered meanwhile."""
    try:
        await asyncio.to_thread(app.state.estimator.reload, bundle)
    except EdgeposeError as err:
        raise HTTPException(422, str(err)) from err
    return {"serving": app.state.estimator.info().bundle_digest}
