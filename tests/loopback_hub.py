"""A stand-in for the Hugging Face Hub on 127.0.0.1: the part of its HTTP interface that loading and pushing need.

Serves model and dataset repositories to the real clients (`hf_hub_download`, `from_pretrained`, `load_dataset`), from
folders or dicts given to `add`, and takes what these push (`create_commit`, `push_to_hub`): in another process, because
they read HF_ENDPOINT when they are imported. Not covered: git, Xet, uploads in parts, .gitignore, merging and the
other doings of pull requests, the rights of several users, pagination of long listings, the dataset viewer.
"""

import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repositories import DATE, GITATTRIBUTES, Commit, HubError, Repository, is_large
from loopback import Loopback

Files = Mapping[str, bytes | str] | str | os.PathLike[str]

USER = "user"  # who every token belongs to


class LoopbackHub(Loopback):
    """The server. Use it as a context manager, in a fixture for one:

        with LoopbackHub() as hub:
            hub.add("dataset", "user/data", {"train.jsonl": "..."})
            subprocess.run([...], env=hub.environment(tmp_path))

    `requests` lists every (method, path) that came in, in order, and `tokens` holds every token that came with one. Set
    `token` and nothing is written, and nothing private read, without it; until then all is open to everyone.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.token: str | None = None
        self.tokens: set[str] = set()
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
            return repository.commit(_contents(files), revision, "Added by the test")

    def commits(self, repo_type: str, repo_id: str, revision: str = "main") -> list[Commit]:
        """Return the commits of a branch or of `refs/pr/N`, newest first."""
        return self.repositories[repo_type, repo_id].history(revision)

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the content of every file of a revision by its path."""
        return self.commits(repo_type, repo_id, revision)[0].files

    def fail(
        self,
        status: int = 503,
        *,
        times: int | None = None,
        match: str = "",
        method: str = "",
        headers: Mapping[str, str] | None = None,
        late: bool = False,
    ) -> None:
        """Answer `status` to the next `times` requests (None: to all) whose path holds the regular expression.

        The path is as it was sent: the slashes in a revision are %2F. `method` narrows it to one, HEAD or POST say, and
        `headers` come with the answer. With `late` the request is carried out first: only its answer is lost.
        """
        self.faults.append(Fault(times, match, method, late, status=status, headers=dict(headers or {})))

    def drop(
        self, after: int = 0, *, times: int | None = None, match: str = "", method: str = "", late: bool = False
    ) -> None:
        """Cut the connection of the next `times` matching requests, after `after` bytes of the body (0: at once).

        With `after`, a request without a body in its answer (HEAD) does not count. `method` and `late`: see `fail`.
        """
        self.faults.append(Fault(times, match, method, late, after=after))

    def heal(self) -> None:
        """Take every fault back."""
        self.faults.clear()

    def environment(self, home: str | os.PathLike[str], token: str | None = None) -> dict[str, str]:
        """Return the environment of a process that knows this Hub only, with its caches and tokens under `home`.

        With `token` it is logged in with that one, and sends it without being told to.
        """
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        return {k: v for k, v in kept.items() if k.lower() not in proxies} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}),
        }

    def take_fault(self, command: str, path: str) -> "Fault | None":
        """Return the fault that the request meets, if any, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.method not in ("", command) or (fault.after and command == "HEAD"):
                    continue
                if fault.times != 0 and re.search(fault.match, path):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: an error `status`, else a cut connection."""

    times: int | None
    match: str
    method: str = ""
    late: bool = False
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0


def _contents(files: Files) -> dict[str, bytes]:
    if isinstance(files, Mapping):
        return {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
    folder = Path(files)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# {id} is user/name, or a name alone; {rev} is one segment: its slashes come as %2F.
_REPO = r"/(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<type>models|datasets){_REPO}"
_GIT = rf"(?:/(?P<type>datasets))?{_REPO}"
_ROUTES = (
    ("GET", re.compile(r"/api/whoami-v2"), "whoami"),
    ("POST", re.compile(r"/api/validate-yaml"), "validate_yaml"),
    ("POST", re.compile(r"/api/repos/create"), "create"),
    ("POST", re.compile(rf"{_API}/branch/(?P<branch>[^/]+)"), "branch"),
    ("POST", re.compile(rf"{_API}/preupload/(?P<rev>[^/]+)"), "preupload"),
    ("POST", re.compile(rf"{_GIT}\.git/info/lfs/objects/batch"), "lfs_batch"),
    ("PUT", re.compile(rf"/lfs-store{_API}/(?P<oid>[0-9a-f]{{64}})"), "lfs_store"),
    ("POST", re.compile(rf"{_API}/commit/(?P<branch>[^/]+)"), "commit"),
    ("GET", re.compile(rf"{_API}/commits/(?P<rev>[^/]+)"), "commits"),
    ("GET", re.compile(rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?"), "tree"),
    ("POST", re.compile(rf"{_API}/paths-info/(?P<rev>[^/]+)"), "paths_info"),
    ("GET", re.compile(rf"{_API}/revision/(?P<rev>[^/]+)"), "info"),
    ("GET", re.compile(rf"{_API}/refs"), "refs"),
    ("GET", re.compile(_API), "info"),
    ("GET", re.compile(rf"{_GIT}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"), "resolve"),
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

    def do_PUT(self) -> None:
        self.answer("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `requests` has them

    def answer(self, method: str) -> None:
        self.hub: LoopbackHub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, url.path))
        if self.token:
            self.hub.tokens.add(self.token)
        self.fault = self.hub.take_fault(self.command, url.path)
        if self.fault and not self.fault.late and not self.fault.after:
            self.strike(self.fault)
            return
        self.query = parse_qs(url.query)
        try:
            self.route(method, url.path)
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            headers["X-Error-Message"] = str(error)
            self.send_json({"error": str(error)} | error.details, error.status, headers)

    def route(self, method: str, path: str) -> None:
        if self.hub.token and self.token not in ("", self.hub.token):
            raise HubError(401, "Invalid credentials in Authorization header")
        for route_method, pattern, name in _ROUTES:
            found = pattern.fullmatch(path)
            if found and route_method == method:
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                return getattr(self, f"on_{name}")(parts)
        raise HubError(404, f"no such endpoint: {method} {path}")

    def log_in(self, code: str = "") -> None:
        """Refuse the request if it came without the token."""
        if self.hub.token and not self.token:
            raise HubError(401, "Invalid username or password.", code)

    def repository(self, parts: dict[str, str], write: bool = False) -> Repository:
        """Return the repository that a request names. Who may not see it cannot tell it from one that is not there."""
        repo_type = "dataset" if parts.get("type") == "datasets" else "model"
        repository = self.hub.repositories.get((repo_type, parts["id"]))
        if repository is None or repository.private or write:
            # For a repository the clients take each 401 from an https address for this code; this one is http.
            self.log_in("RepoNotFound")
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def find(self, parts: dict[str, str]) -> tuple[Repository, str]:
        """Return the repository and the commit that a request names."""
        repository = self.repository(parts)
        return repository, repository.resolve(parts.get("rev", "main"))

    def on_whoami(self, parts: dict[str, str]) -> None:
        self.log_in()
        token = {"displayName": "loopback", "role": "write"}
        self.send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}})

    def on_validate_yaml(self, parts: dict[str, str]) -> None:
        found = re.match(r"---\r?\n(.*?)^---\s*$", json.loads(self.body)["content"], re.DOTALL | re.MULTILINE)
        try:
            errors = [] if not found or isinstance(yaml.safe_load(found[1]), dict | None) else ["not a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        status = 400 if errors else 200
        self.send_json({"errors": [{"message": error} for error in errors], "warnings": []}, status)

    def on_create(self, parts: dict[str, str]) -> None:
        self.log_in()
        asked = json.loads(self.body)
        repo_type = asked.get("type") or "model"
        if repo_type not in ("model", "dataset"):
            raise HubError(400, f"the loopback hub has models and datasets, not {repo_type}s")
        repository = Repository(repo_type, f"{asked.get('organization') or USER}/{asked['name']}")
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        url = self.hub.url + repository.path
        with self.hub.lock:
            if (repo_type, repository.repo_id) in self.hub.repositories:
                raise HubError(409, f"You already created this {repo_type} repo", url=url)
            repository.commit({".gitattributes": GITATTRIBUTES}, "main", "initial commit")
            self.hub.repositories[repo_type, repository.repo_id] = repository
        self.send_json({"url": url, "name": repository.repo_id, "id": repository.repo_id})

    def on_branch(self, parts: dict[str, str]) -> None:
        repository = self.repository(parts, write=True)
        branch = parts["branch"]
        with self.hub.lock:
            if branch.startswith("refs/"):
                raise HubError(400, f"Invalid reference for a branch: {branch}")
            if branch in repository.branches:
                raise HubError(409, f"Reference already exists: {branch}")
            start = json.loads(self.body or "{}").get("startingPoint") or "main"
            repository.branches[branch] = repository.resolve(start)
        self.send_json({"success": True})

    def on_preupload(self, parts: dict[str, str]) -> None:
        repository = self.repository(parts, write=True)
        blobs = repository.commits[repository.resolve(parts["rev"])].blobs
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in blobs:
                files[-1]["oid"] = blobs[file["path"]].etag
        self.send_json({"files": files, "commitOid": repository.resolve(parts["rev"])})

    def on_lfs_batch(self, parts: dict[str, str]) -> None:
        repository = self.repository(parts, write=True)
        store = f"{self.hub.url}/lfs-store/api/{repository.repo_type}s/{repository.repo_id}"
        objects = json.loads(self.body)["objects"]
        for file in objects:
            if file["oid"] not in repository.uploads:
                file["actions"] = {"upload": {"href": f"{store}/{file['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def on_lfs_store(self, parts: dict[str, str]) -> None:
        """Keep a large file, in the stead of the store whose address is its own permission."""
        if self.token:
            raise HubError(400, "Only one auth mechanism allowed")
        if hashlib.sha256(self.body).hexdigest() != parts["oid"]:
            raise HubError(400, "The SHA256 of the body is not that of the address")
        key = (parts["type"].removesuffix("s"), parts["id"])
        self.hub.repositories[key].uploads[parts["oid"]] = self.body
        self.send(200, b"", {"ETag": f'"{parts["oid"]}"'})

    def on_commit(self, parts: dict[str, str]) -> None:
        repository = self.repository(parts, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        pull = self.query.get("create_pr", ["0"])[0] in ("1", "true")
        with self.hub.lock:
            sha, branch = repository.push(lines, parts["branch"], pull)
        url = self.hub.url + repository.path
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        if pull:
            answer["pullRequestUrl"] = f"{url}/discussions/{branch.removeprefix('refs/pr/')}"
        self.send_json(answer)

    def on_commits(self, parts: dict[str, str]) -> None:
        repository, sha = self.find(parts)
        shared = {"authors": [{"user": USER}], "date": DATE}
        history = repository.history(sha)
        self.send_json([shared | {"id": c.sha, "title": c.title, "message": c.description} for c in history])

    def on_info(self, parts: dict[str, str]) -> None:
        repository, sha = self.find(parts)
        self.send_json(repository.info(sha, blobs="blobs" in self.query))

    def on_refs(self, parts: dict[str, str]) -> None:
        repository, _ = self.find(parts)
        pulls = [{"name": n, "ref": n, "targetCommit": repository.branches[n]} for n in repository.pulls]
        heads = {n: sha for n, sha in repository.branches.items() if n not in repository.pulls}
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in heads.items()]
        self.send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

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
        blob = repository.commits[sha].blobs.get(parts["path"])
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
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
        if self.fault and self.fault.late and not self.fault.after:
            self.strike(self.fault)
            return
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

    def strike(self, fault: Fault) -> None:
        """Answer as the fault has it."""
        self.fault = None
        if fault.status:
            self.send(fault.status, b"the loopback hub was told to fail", fault.headers)
        else:
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
