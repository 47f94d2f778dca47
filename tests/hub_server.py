"""A local server that speaks the part of the Hub's API that huggingface_hub uses to publish and to load a model:
repositories and their gates, pre-upload, large files (whole and in parts), commits, the card's validation, listing,
download."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")
CUT = "cut"
RELATIONS = {"finetune", "adapter", "quantized", "merge"}
TASKS = {"text-to-image", "unconditional-image-generation"}
LICENCES = {"mit", "apache-2.0", "creativeml-openrail-m", "openrail", "other", "unknown"}


@dataclass
class Fault:
    """The next `times` requests of a kind get this status; `CUT` closes the connection in the middle of the body."""

    method: str
    path: str
    status: int | str
    times: int = 1


class HubServer:
    """Keeps commits by repository; `files` holds the newest, `requests` lists method and path.

    Its address is that of the servers before it in this process, unless one of them is still running.

    Args:
        status: Every request is refused with it, unless it is 200.
        part_size: Large files are asked for in parts of so many bytes.
        faults: What goes wrong.
    """

    _port = 0

    def __init__(self, status: int = 200, part_size: int | None = None, faults: list[Fault] | None = None):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.gated: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.faults = faults or []
        self.status = status
        self.part_size = part_size
        self.large: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._large_paths: dict[str, dict[str, str]] = {}
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self._lock = threading.RLock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def handle_any(self):
                with hub._lock:
                    hub._handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", HubServer._port), Handler)
        except OSError:
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        HubServer._port = HubServer._port or self._server.server_port
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, path: str) -> int:
        """How many requests of a kind came in."""
        return sum(kind == method and bool(re.search(path, place)) for kind, place in self.requests)

    def start_repository(self, name: str, private: bool) -> None:
        """An empty repository."""
        self.files[name] = {}
        self.private[name] = private
        self._large_paths[name] = {}
        self._commits[name] = {self._sha(name): {}}

    # Requests

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        self.tokens.add(request.headers.get("Authorization", ""))
        length = int(request.headers.get("Content-Length", 0))
        for fault in self.faults:
            if fault.times and fault.method == request.command and re.search(fault.path, path):
                fault.times -= 1
                if fault.status == CUT:
                    request.rfile.read(length // 2)
                    request.close_connection = True
                    request.connection.close()
                    return
                request.rfile.read(length)
                self._answer(request, {"error": f"refused with {fault.status}"}, int(fault.status))
                return
        body = self._body(request, length)
        if self.status != 200:
            self._answer(request, {"error": "refused"}, self.status)
            return
        for method, pattern, handler in (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/(.+)/preupload/.+", self._preupload),
            ("POST", r"/(.+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/(\w+)", self._put),
            ("PUT", r"/large/(\w+)/(\d+)", self._put_part),
            ("POST", r"/large/(\w+)/complete", self._complete),
            ("POST", r"/api/models/(.+)/commit/.+", self._commit),
            ("PUT", r"/api/models/([^/]+/[^/]+)/settings", self._set),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("GET", r"/large/(\w+)", self._get),
        ):
            match = re.fullmatch(pattern, path)
            if match and (request.command == method or (method, request.command) == ("GET", "HEAD")):
                handler(request, body, *match.groups())
                return
        self._missing(request, "RepoNotFound")

    @staticmethod
    def _body(request: BaseHTTPRequestHandler, length: int) -> bytes:
        if request.headers.get("Transfer-Encoding") != "chunked":
            return request.rfile.read(length)
        parts = []
        while size := int(request.rfile.readline(), 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        return b"".join(parts)

    def _answer(self, request, value, status=200, headers=None):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            request.send_header(name, text)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _missing(self, request, code, status=404, headers=None):
        self._answer(request, {"error": code}, status, {"X-Error-Code": code, **(headers or {})})

    # Accounts and repositories

    def _whoami(self, request, _):
        self._answer(request, {"name": "tester", "type": "user"})

    def _create(self, request, body):
        if not request.headers.get("Authorization"):
            self._answer(request, {"error": "Invalid username or password."}, 401)
            return
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        answer = {"url": f"{self.address}/{name}", "name": name}
        if name in self.files:
            self._answer(request, {"error": "You already created this model repo", **answer}, 409)
            return
        self.start_repository(name, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self._answer(request, answer)

    def _set(self, request, body, name):
        self.gated[name] = json.loads(body)["gated"]
        self._answer(request, {})

    def _validate(self, request, body):
        errors = card_errors(json.loads(body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(request, answer, 400 if errors else 200)

    # Uploading

    def _preupload(self, request, body, name):
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in self.files[name]:
                answer["oid"] = self._oid(name, file["path"])
            answers.append(answer)
        self._answer(request, {"files": answers})

    def _batch(self, request, body, _):
        objects = []
        for file in json.loads(body)["objects"]:
            entry = dict(file)
            if file["oid"] not in self.large:
                upload = {"href": f"{self.address}/large/{file['oid']}"}
                if self.part_size and file["size"] > self.part_size:
                    parts = -(-file["size"] // self.part_size)
                    upload = {
                        "href": f"{self.address}/large/{file['oid']}/complete",
                        "header": {"chunk_size": str(self.part_size)}
                        | {str(part): f"{self.address}/large/{file['oid']}/{part}" for part in range(1, parts + 1)},
                    }
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        self._answer(request, {"transfer": "basic", "objects": objects})

    def _put(self, request, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(request, {"error": "the content does not match its hash"}, 400)
            return
        self.large[oid] = body
        self._answer(request, {})

    def _put_part(self, request, body, oid, part):
        self._parts.setdefault(oid, {})[int(part)] = body
        self._answer(request, {}, headers={"ETag": hashlib.md5(body).hexdigest()})

    def _complete(self, request, body, oid):
        parts = [self._parts[oid][entry["partNumber"]] for entry in json.loads(body)["parts"]]
        self._put(request, b"".join(parts), oid)

    def _commit(self, request, body, name):
        entries = [json.loads(line) for line in body.splitlines()]
        files, large = dict(self.files[name]), dict(self._large_paths[name])
        for value in (entry["value"] for entry in entries if entry["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (entry["value"] for entry in entries if entry["key"] == "lfsFile"):
            if value["oid"] not in self.large:
                self._answer(request, {"error": f"{value['path']} was not uploaded"}, 400)
                return
            files[value["path"]], large[value["path"]] = self.large[value["oid"]], value["oid"]
        self.files[name], self._large_paths[name] = files, large
        sha = self._sha(name)
        self._commits[name][sha] = files
        self._answer(request, {"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha})

    # Downloading

    def _sha(self, name):
        digest = hashlib.sha1(name.encode())
        for path, content in sorted(self.files[name].items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def _oid(self, name, path):
        if path in self._large_paths[name]:
            return self._large_paths[name][path]
        content = self.files[name][path]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _readable(self, request, name, revision):
        """The files of a revision, or None after an answer that refuses them."""
        if name not in self.files or (self.private[name] and not request.headers.get("Authorization")):
            self._missing(request, "RepoNotFound")
            return None
        sha = self._sha(name) if revision in (None, "main") else revision
        if sha not in self._commits[name]:
            self._missing(request, "RevisionNotFound")
            return None
        return self._commits[name][sha]

    def _info(self, request, _, name, revision=None):
        files = self._readable(request, name, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in sorted(files)]
            sha = self._sha(name)
            self._answer(request, {"id": name, "modelId": name, "sha": sha, "private": self.private[name],
                                   "gated": self.gated.get(name, False), "tags": [], "siblings": siblings})  # fmt: skip

    def _tree(self, request, _, name, revision):
        files = self._readable(request, name, revision)
        if files is not None:
            entries = []
            for path, content in sorted(files.items()):
                entry = {"type": "file", "path": path, "size": len(content), "oid": self._oid(name, path)}
                if path in self._large_paths[name]:
                    entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self._answer(request, entries)

    def _resolve(self, request, _, name, revision, path):
        files = self._readable(request, name, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": self._sha(name)}
        if path not in files:
            self._missing(request, "EntryNotFound", headers=commit)
        elif path in self._large_paths[name]:
            oid = self._large_paths[name][path]
            # Large files lie on another host, as the Hub's do.
            place = self.address.replace("127.0.0.1", "localhost")
            linked = {"Location": f"{place}/large/{oid}", "X-Linked-Etag": f'"{oid}"',
                      "X-Linked-Size": str(len(files[path]))}  # fmt: skip
            self._answer(request, b"", 302, commit | linked)
        else:
            self._answer(request, files[path], headers=commit | {"ETag": f'"{self._oid(name, path)}"'})

    def _get(self, request, _, oid):
        self._answer(request, self.large[oid], headers={"ETag": f'"{oid}"'})


def card_errors(content: str) -> list[str]:
    """What the Hub's documentation of model cards forbids, as far as this package's cards could do it."""
    match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    if not match:
        return ["there is no metadata block"]
    data = yaml.safe_load(match[1])
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"]
    errors = []
    for name in ("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model_relation"):
        if name in data and not isinstance(data[name], str):
            errors.append(f"{name} must be a string")
    if "base_model" in data and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data["base_model"])):
        errors.append("base_model must be the name of a model on the Hub")
    for name, allowed in (("base_model_relation", RELATIONS), ("pipeline_tag", TASKS), ("license", LICENCES)):
        if name in data and data[name] not in allowed:
            errors.append(f"{name} must be one of {', '.join(sorted(allowed))}")
    if data.get("license") == "other" and "license_name" not in data:
        errors.append("license_name is needed where license is other")
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append("tags must be a list of strings")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append("model-index needs a name and results")
            continue
        for result in model["results"]:
            for part, names in (("task", ["type"]), ("dataset", ["name", "type"])):
                errors += [f"{part}.{name} must be a string" for name in names
                           if not isinstance(result.get(part, {}).get(name), str)]  # fmt: skip
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append("a metric needs a type and a value")
        places = Counter(json.dumps(result["dataset"], sort_keys=True) for result in model["results"])
        errors += [f"two results share the dataset {place}" for place, times in places.items() if times > 1]
    return errors
