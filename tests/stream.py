"""A camera on the network: motion JPEG over HTTP, from this process.

Invariant: frames come one by one, each brighter than the last, until nobody listens.
"""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest


class Stream(http.server.BaseHTTPRequestHandler):
    """Motion JPEG as cameras send it: grey frames, each brighter than the last."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        try:
            for number in range(250):
                picture = cv2.imencode(".jpg", np.full((48, 64, 3), number, np.uint8))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n")
                time.sleep(0.02)
        except OSError:
            pass  # nobody listens any more

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the library's name
        pass


@pytest.fixture
def stream() -> Iterator[str]:
    """Host, port and path of a stream of 64 x 48 pixels."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stream) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}/stream.mjpg"
        server.shutdown()
