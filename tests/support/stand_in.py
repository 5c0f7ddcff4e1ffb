"""A model for Label Studio to connect to that says whatever version a test wants, in a moment."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn:
    """Answers as an ML backend does; predicts one choice for every task. Remembers the paths it was asked for."""

    def __init__(self, version: str, authorization: str | None = None) -> None:
        self.version, self.choice, self.authorization = version, "Mars", authorization
        self.asked: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.model = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path != "/predict":
            return {"status": "UP", "model_version": self.version}
        region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [self.choice]}}
        prediction = {"result": [region], "score": 0.5, "model_version": self.version}
        return {"results": [prediction for _ in body["tasks"]]}


@contextmanager
def stand_in(version: str, authorization: str | None = None) -> Iterator[StandIn]:
    model = StandIn(version, authorization)
    try:
        yield model
    finally:
        model.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    model: StandIn


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        model = self.server.model
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        model.asked.append(self.path)
        allowed = model.authorization in (None, self.headers.get("Authorization"))
        answer = json.dumps(model.answer(self.path, json.loads(body or b"{}")) if allowed else {}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        return
