"""A local server that speaks the part of the Hub's API that an upload of a plain folder uses."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """Keeps what is committed in `files`, by repository; `requests` lists method and path."""

    def __init__(self, status: int = 200):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        self.status = status
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def _answer(self, value, status=200):
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                hub.requests.append(("GET", self.path))
                if hub.status != 200:
                    self._answer({"error": "refused"}, hub.status)
                elif self.path == "/api/whoami-v2":
                    self._answer({"name": "tester", "type": "user"})
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            do_HEAD = do_GET

            def do_POST(self):
                hub.requests.append(("POST", self.path))
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if hub.status != 200:
                    self._answer({"error": "refused"}, hub.status)
                elif self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
                    hub.files.setdefault(name, {})
                    hub.private[name] = bool(wanted.get("private") or wanted.get("visibility") == "private")
                    self._answer({"url": f"{hub.address}/{name}", "name": name})
                elif "/preupload/" in self.path:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    self._answer(
                        {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
                    )
                elif "/commit/" in self.path:
                    name = re.match(r"/api/models/(.+)/commit/", self.path).group(1)
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            content = base64.b64decode(entry["value"]["content"])
                            hub.files[name][entry["value"]["path"]] = content
                    self._answer({"commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
                else:
                    self._answer({})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
