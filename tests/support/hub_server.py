"""A stand-in for the hub on this machine: what huggingface_hub asks when a folder is pushed."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
from huggingface_hub import utils


class Hub(ThreadingHTTPServer):
    """Repositories (name to files) and the tokens that requests carried."""

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.repositories, self.tokens = token, {}, set()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, body: dict, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def allowed(self) -> bool:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.tokens.add(given)
        if given != self.server.token:
            self.answer({"error": f"Invalid token {given}"}, 401)
        return given == self.server.token

    def do_GET(self):
        if not self.allowed():
            return
        known = self.path == "/api/whoami-v2"
        self.answer({"name": "owner"} if known else {"error": "Not found"}, 200 if known else 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":  # which is asked without a token
            return self.answer({"errors": [], "warnings": []})
        if not self.allowed():
            return
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "owner"
            if owner == "closed":
                return self.answer({"error": "no rights\nunder closed"}, 403)
            self.server.repositories.setdefault(f"{owner}/{name}", {})
            return self.answer({"url": f"https://huggingface.co/{owner}/{name}"})
        name = "/".join(self.path.split("/")[3:5])
        if self.path.endswith("/preupload/main"):
            files = []
            for file in json.loads(body)["files"]:
                files.append({**file, "uploadMode": "regular", "shouldIgnore": False})
            return self.answer({"files": files})
        assert self.path.endswith("/commit/main"), self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        address = {"commitUrl": f"https://huggingface.co/{name}/commit/1", "commitOid": "1" * 40}
        self.answer({**address, "success": True})


@contextlib.contextmanager
def hub(monkeypatch, token: str):
    """A running stand-in, which huggingface_hub takes for the hub."""
    server = Hub(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    utils.close_session()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        utils.close_session()
