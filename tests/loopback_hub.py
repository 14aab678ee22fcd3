"""A stand-in for the Hugging Face Hub on 127.0.0.1: the part of its HTTP interface that loading needs.

Serves model and dataset repositories from folders or dicts to the real clients (`hf_hub_download`, `from_pretrained`,
`load_dataset`), in another process, because they read HF_ENDPOINT when they are imported. Read-only over HTTP: commits
are made by `add`. Not covered: pushing, authentication, git, Xet, pagination of long listings, the dataset viewer.
"""

import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import Loopback

Files = Mapping[str, bytes | str] | str | os.PathLike[str]


class LoopbackHub(Loopback):
    """The server. Use it as a context manager, in a fixture for one:

        with LoopbackHub() as hub:
            hub.add("dataset", "user/data", {"train.jsonl": "..."})
            subprocess.run([...], env=hub.environment(tmp_path))

    `requests` lists every (method, path) that came in, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self

    def add(self, repo_type: str, repo_id: str, files: Files, revision: str = "main") -> str:
        """Make `files` (a folder, or contents by path) the content of a branch; return the commit's sha."""
        if repo_type not in ("model", "dataset"):
            raise ValueError(f"repo_type is 'model' or 'dataset', not {repo_type!r}")
        with self.lock:
            repository = self.repositories.setdefault((repo_type, repo_id), Repository(repo_type, repo_id))
            return repository.commit(_contents(files), revision)

    def fail(self, status: int = 503, *, times: int | None = None, match: str = "") -> None:
        """Answer `status` to the next `times` requests (None: to all) whose path holds the regular expression."""
        self.faults.append(Fault(times, match, status=status))

    def drop(self, after: int = 0, *, times: int | None = None, match: str = "") -> None:
        """Cut the connection of the next `times` matching requests, after `after` bytes of the body (0: at once).

        With `after`, a request without a body in its answer (HEAD) does not count.
        """
        self.faults.append(Fault(times, match, after=after))

    def heal(self) -> None:
        """Take every fault back."""
        self.faults.clear()

    def environment(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """Return the environment of a process that knows this Hub only, with its caches and tokens under `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        return {k: v for k, v in kept.items() if k.lower() not in proxies} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def take_fault(self, command: str, path: str) -> "Fault | None":
        """Return the fault that the request meets, if any, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.match, path) and not (fault.after and command == "HEAD"):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: an error `status`, else a cut connection."""

    times: int | None
    match: str
    status: int | None = None
    after: int = 0


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    data: bytes

    @cached_property
    def oid(self) -> str:
        """The id that git gives it."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """A repository: its commits by sha, and its branches."""

    repo_type: str
    repo_id: str
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        """Add a commit of exactly `files` at the head of `branch`."""
        blobs = {path: Blob(data) for path, data in sorted(files.items())}
        tree = "".join(f"{blob.oid} {path}\n" for path, blob in blobs.items())
        sha = hashlib.sha1(f"{self.repo_id} {branch} {len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[sha] = blobs
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """Return the sha of a branch or of a commit."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise NotFoundError("RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def info(self, sha: str) -> dict[str, Any]:
        """Return what `/api/{type}s/{id}` answers."""
        siblings = [{"rfilename": path} for path in self.commits[sha]]
        shared = {"id": self.repo_id, "sha": sha, "siblings": siblings, "private": False, "gated": False, "tags": []}
        return shared | {"lastModified": "2024-01-01T00:00:00.000Z", "downloads": 0, "likes": 0, "disabled": False}

    def tree(self, sha: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Return the entries of a folder, with those of the folders in it where `recursive`."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in self.commits[sha].items():
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    parent = prefix + "/".join(parts[:depth])
                    entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": Blob(parent.encode()).oid}
                if recursive or len(parts) == 1:
                    entries[path] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
        if folder and not entries:
            raise NotFoundError("EntryNotFound", f"{folder} does not exist on {sha}")
        return list(entries.values())


class NotFoundError(Exception):
    """A 404, with the code by which the clients tell the causes apart."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _contents(files: Files) -> dict[str, bytes]:
    if isinstance(files, Mapping):
        return {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
    folder = Path(files)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# {id} is user/name, or a name alone; {rev} is one segment: its slashes come as %2F.
_REPO = r"/(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<type>models|datasets){_REPO}"
_ROUTES = (
    ("GET", re.compile(rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?"), "tree"),
    ("POST", re.compile(rf"{_API}/paths-info/(?P<rev>[^/]+)"), "paths_info"),
    ("GET", re.compile(rf"{_API}/revision/(?P<rev>[^/]+)"), "info"),
    ("GET", re.compile(rf"{_API}/refs"), "refs"),
    ("GET", re.compile(_API), "info"),
    ("GET", re.compile(rf"(?:/(?P<type>datasets))?{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"), "resolve"),
)


class _Handler(BaseHTTPRequestHandler):
    """One connection. A new endpoint is a line in `_ROUTES` and a method of that name."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `requests` has them

    def answer(self, method: str) -> None:
        hub: LoopbackHub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        hub.requests.append((self.command, url.path))
        self.fault = hub.take_fault(self.command, url.path)
        if self.fault and self.fault.status:
            return self.send(self.fault.status, b"the loopback hub was told to fail", {})
        if self.fault and not self.fault.after:
            return self.cut()
        self.query = parse_qs(url.query)
        for route_method, pattern, name in _ROUTES:
            found = pattern.fullmatch(url.path)
            if found and route_method == method:
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                try:
                    return getattr(self, f"on_{name}")(parts)
                except NotFoundError as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                    return self.send_json({"error": str(error)}, 404, headers)
        return self.send_json({"error": f"no such endpoint: {method} {url.path}"}, 404)

    def find(self, parts: dict[str, str]) -> tuple[Repository, str]:
        """Return the repository and the commit that a request names."""
        key = ("dataset" if parts.get("type") == "datasets" else "model", parts["id"])
        if key not in self.server.hub.repositories:
            raise NotFoundError("RepoNotFound", "Repository not found")
        repository = self.server.hub.repositories[key]
        return repository, repository.resolve(parts.get("rev", "main"))

    def on_info(self, parts: dict[str, str]) -> None:
        repository, sha = self.find(parts)
        self.send_json(repository.info(sha))

    def on_refs(self, parts: dict[str, str]) -> None:
        repository, _ = self.find(parts)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repository.branches.items()]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def on_tree(self, parts: dict[str, str]) -> None:
        repository, sha = self.find(parts)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        self.send_json(repository.tree(sha, parts.get("path", "").strip("/"), recursive))

    def on_paths_info(self, parts: dict[str, str]) -> None:
        repository, sha = self.find(parts)
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in repository.tree(sha, "", recursive=True)}
        self.send_json([entries[path] for path in paths if path in entries])

    def on_resolve(self, parts: dict[str, str]) -> None:
        repository, sha = self.find(parts)
        blob = repository.commits[sha].get(parts["path"])
        if blob is None:
            raise NotFoundError("EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.send(200, blob.data, headers)
        size, first = len(blob.data), int(asked[1])
        last = min(int(asked[2] or size - 1), size - 1)
        if first > last:
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        content_range = {"Content-Range": f"bytes {first}-{last}/{size}"}
        return self.send(206, blob.data[first : last + 1], headers | content_range)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.fault is not None and 0 < self.fault.after < len(body)
            self.wfile.write(body[: self.fault.after] if cut else body)
            if cut:
                self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
