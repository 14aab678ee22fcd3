"""What the stand-in for the Hugging Face Hub keeps: repositories, their commits, and the files in them."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# What git keeps as a pointer to a large file: these, as .gitattributes says, and whatever is larger than LFS_SIZE.
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".gz", ".npy", ".parquet", ".pt", ".safetensors", ".zip")
LFS_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

DATE = "2024-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer that is not 2xx, with the code by which the clients tell the causes apart."""

    def __init__(self, status: int, message: str, code: str = "", **details: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = details


@dataclass(frozen=True)
class Blob:
    """The content of one file, which git keeps itself or, with `lfs`, as a pointer."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """The id that LFS gives it."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git keeps in its stead where it is large."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The id that git gives it."""
        kept = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        """The id of the content, by which a client sees whether it has it."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: what it says, and every file as it is then."""

    sha: str
    parent: str | None
    title: str
    description: str
    blobs: dict[str, Blob]

    @property
    def files(self) -> dict[str, bytes]:
        """The content of every file by its path."""
        return {path: blob.data for path, blob in self.blobs.items()}


@dataclass
class Repository:
    """A repository: its commits by sha, the heads of its branches and `refs/pr/N`, and its LFS files by sha256."""

    repo_type: str
    repo_id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where its page is."""
        return f"/datasets/{self.repo_id}" if self.repo_type == "dataset" else f"/{self.repo_id}"

    @property
    def pulls(self) -> list[str]:
        """The revisions of its pull requests."""
        return [name for name in self.branches if name.startswith("refs/pr/")]

    def commit(
        self, files: Mapping[str, bytes], branch: str, title: str = "", description: str = "", parent: str | None = None
    ) -> str:
        """Add a commit of exactly `files` on top of `parent` (None: of the branch); it is then the branch's head."""
        parent = parent or self.branches.get(branch)
        blobs = {path: Blob(data, is_large(path, len(data))) for path, data in sorted(files.items())}
        self.uploads |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        tree = "".join(f"{blob.oid} {path}\n" for path, blob in blobs.items())
        sha = hashlib.sha1(f"{self.repo_id} {branch} {len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, description, blobs)
        self.branches[branch] = sha
        return sha

    def push(self, lines: Iterable[dict[str, Any]], revision: str, pull: bool) -> tuple[str, str]:
        """Carry out the lines of a commit request; return the commit's sha and the branch that it is the head of.

        With `pull` that is a new pull request, from the commit's parent where it names one.
        """
        operations = [(line["key"], line["value"]) for line in lines]
        header = next((value for key, value in operations if key == "header"), {})
        if not header.get("summary"):
            raise HubError(400, "A commit has a summary")
        if revision not in self.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = header.get("parentCommit") or self.branches[revision]
        if not pull and parent != self.branches[revision]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = self.commits[self.resolve(parent)].files
        for key, value in operations:
            if key != "header":
                self.change(files, key, value)
        branch = f"refs/pr/{len(self.pulls) + 1}" if pull else revision
        return self.commit(files, branch, header["summary"], header.get("description", ""), parent), branch

    def change(self, files: dict[str, bytes], key: str, value: dict[str, str]) -> None:
        """Carry out one line of a commit request on `files`."""
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.uploads:
                raise HubError(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
            files[path] = self.uploads[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                kind = key.removeprefix("deleted").lower()
                raise HubError(404, f"A {kind} with this name doesn't exist: {path}", "EntryNotFound")
            for p in gone:
                del files[p]
        else:
            raise HubError(400, f"Unknown key {key!r} in a commit")

    def resolve(self, revision: str) -> str:
        """Return the sha of a branch, of a pull request or of a commit."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def history(self, revision: str) -> list[Commit]:
        """Return the commits of a revision, newest first."""
        sha: str | None = self.resolve(revision)
        found = []
        while sha:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found

    def info(self, sha: str, blobs: bool) -> dict[str, Any]:
        """Return what `/api/{type}s/{id}` answers, with sizes and ids of the files where `blobs`."""
        siblings = [{"rfilename": path} for path in self.commits[sha].blobs]
        if blobs:
            siblings = [
                {"rfilename": path, "size": len(blob.data), "blobId": blob.oid}
                | ({"lfs": _lfs(blob) | {"sha256": blob.sha256}} if blob.lfs else {})
                for path, blob in self.commits[sha].blobs.items()
            ]
        shared = {"id": self.repo_id, "sha": sha, "siblings": siblings, "private": self.private, "gated": False}
        return shared | {"tags": [], "lastModified": DATE, "downloads": 0, "likes": 0, "disabled": False}

    def tree(self, sha: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Return the entries of a folder, with those of the folders in it where `recursive`."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in self.commits[sha].blobs.items():
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    parent = prefix + "/".join(parts[:depth])
                    entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": Blob(parent.encode()).oid}
                if recursive or len(parts) == 1:
                    entries[path] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
                    entries[path] |= {"lfs": _lfs(blob)} if blob.lfs else {}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {sha}", "EntryNotFound")
        return list(entries.values())


def is_large(path: str, size: int) -> bool:
    """Return whether git keeps a pointer to this file only. The clients never send an empty one as a large one."""
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


def _lfs(blob: Blob) -> dict[str, Any]:
    return {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
