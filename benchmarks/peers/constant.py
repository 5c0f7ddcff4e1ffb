"""A backend that answers at once, the same for every task: ``python -m benchmarks.peers.constant PORT``."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = "constant"
REGION = {
    "id": "choice-1", "from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]},
    "score": 0.987654321,
}  # fmt: skip
PREDICTION = {"result": [REGION], "score": 0.987654321, "model_version": VERSION}


def answer(path: str, body: bytes) -> dict[str, Any]:
    """What a path is answered with."""
    if path == "/predict":
        return {"results": [PREDICTION] * len(json.loads(body)["tasks"])}
    return {"status": "UP", "model_version": VERSION}


class _Handler(BaseHTTPRequestHandler):
    wbufsize = 65536

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = json.dumps(answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    _Server(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
