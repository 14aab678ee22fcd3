"""The stand-in for the Hub against the real clients, which push to it and read back what they pushed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.client import HTTPConnection
from typing import Any

import pytest
from loopback_hub import LoopbackHub

TOKEN = "hf_loopback"

PRELUDE = """
import json, sys, time
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))  # the clients wait between tries
api = HfApi()
repo = {"repo_id": "user/data", "repo_type": "dataset"}

def commit(files, title="files", **settings):
    operations = [
        CommitOperationDelete(path) if data is None else CommitOperationAdd(path, data) for path, data in files.items()
    ]
    return api.create_commit(operations=operations, commit_message=title, **{**repo, **settings})

def read(path, **settings):
    return Path(hf_hub_download(filename=path, **{**repo, **settings})).read_text()

def refused(do, *args, **settings):
    try:
        do(*args, **settings)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

def tell(**found):
    print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    def run(script: str, token: str | None = None) -> dict[str, Any]:
        command = [sys.executable, "-c", PRELUDE + script]
        home = tmp_path_factory.mktemp("home")  # a new one each time: what is cached there is not asked for
        environment = {**hub.environment(home, token), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_what_is_committed_is_read_back_until_a_commit_deletes_it(hub, client):
    found = client("""
first = api.create_repo(**repo)
again = refused(api.create_repo, **repo)
same = api.create_repo(**repo, exist_ok=True)
info = commit({"README.md": b"---\\nlicense: mit\\n---\\n", "data/a.parquet": b"rows", "data/a.json": b"{}"}, "all")
files = {f.path: f.lfs for f in api.list_repo_tree(**repo, recursive=True) if hasattr(f, "lfs")}
texts = [read(path) for path in ("README.md", "data/a.parquet", "data/a.json")]
empty = commit({"data/a.json": b"{}", "data/a.parquet": b"rows"}, "nothing new")
commit({"data/a.json": None, "data/a.parquet": b"other rows"}, "less")
tell(
    urls=[first, same],
    again=again,
    oids=[info.oid, empty.oid],
    url=info.commit_url,
    files=files,
    sizes={s.rfilename: s.size for s in api.repo_info(**repo, files_metadata=True).siblings},
    texts=texts,
    titles=[c.title for c in api.list_repo_commits(**repo)],
    absent=refused(read, "data/a.json"),
    no_file=refused(commit, {"data/a.json": None}),
    no_repo=refused(commit, {"a": b""}, repo_id="user/absent"),
    bad_card=refused(commit, {"README.md": b"---\\na: b: c\\n---\\n"}),
)
""")
    assert found["urls"] == [f"{hub.url}/datasets/user/data"] * 2
    assert found["again"] == ["HfHubHTTPError", 409]
    last, second, initial = hub.commits("dataset", "user/data")
    assert found["titles"] == [last.title, second.title, initial.title] == ["less", "all", "initial commit"]
    assert [last.parent, second.parent, initial.parent] == [second.sha, initial.sha, None]
    assert found["oids"] == [second.sha, second.sha]
    assert found["url"] == f"{hub.url}/datasets/user/data/commit/{second.sha}"
    assert found["files"].keys() == second.files.keys()
    lfs = {"size": 4, "sha256": sha256(b"rows").hexdigest(), "pointer_size": 126}
    assert found["files"]["data/a.parquet"] == lfs
    assert [path for path, lfs in found["files"].items() if lfs] == ["data/a.parquet"]
    assert found["texts"] == ["---\nlicense: mit\n---\n", "rows", "{}"]
    files = hub.files("dataset", "user/data")
    assert {**files, ".gitattributes": b""} == {
        ".gitattributes": b"",
        "README.md": b"---\nlicense: mit\n---\n",
        "data/a.parquet": b"other rows",
    }
    assert found["sizes"] == {path: len(data) for path, data in files.items()}
    assert found["absent"] == found["no_file"] == ["RemoteEntryNotFoundError", 404]
    assert found["no_repo"] == ["RepositoryNotFoundError", 404]
    assert found["bad_card"] == ["ValueError", None]


def test_branches_and_pull_requests_leave_main_alone_and_a_moved_head_refuses(hub, client):
    start = hub.add("dataset", "user/data", {"a.json": "main"})
    found = client(f"""
start = {start!r}
api.create_branch(**repo, branch="side")
taken = refused(api.create_branch, **repo, branch="side")
api.create_branch(**repo, branch="side", exist_ok=True)
api.create_branch(**repo, branch="a/b", revision=start)
nowhere = refused(api.create_branch, **repo, branch="other", revision="nowhere")
commit({{"a.json": b"side"}}, revision="side", parent_commit=start)
pull = commit({{"a.json": b"pull", "b.parquet": b"rows"}}, create_pr=True, parent_commit=start)
more = commit({{"c.json": b"more"}}, revision="refs/pr/1", parent_commit=pull.oid)
moved = refused(commit, {{"a.json": b"late"}}, revision="side", parent_commit=start)
unknown = refused(commit, {{"a.json": b"late"}}, revision="nowhere")
another = commit({{"a.json": b"another"}}, create_pr=True, revision="side")
refs = api.list_repo_refs(**repo, include_pull_requests=True)
tell(
    refused=[taken, nowhere, moved, unknown],
    pulls=[pull.pr_revision, more.pr_revision, another.pr_revision],
    url=pull.pr_url,
    heads=[pull.oid, more.oid],
    texts=[read("a.json", revision=r) for r in (None, "main", "side", "a/b", "refs/pr/1", "refs/pr/2", pull.oid)],
    sha=api.repo_info(**repo, revision="refs/pr/1").sha,
    refs=[[r.ref for r in refs.branches], [r.ref for r in refs.pull_requests]],
)
""")
    assert found["refused"] == [
        ["HfHubHTTPError", 409],
        ["RevisionNotFoundError", 404],
        ["HfHubHTTPError", 412],
        ["RevisionNotFoundError", 404],
    ]
    assert found["pulls"] == ["refs/pr/1", None, "refs/pr/2"]
    assert found["url"] == f"{hub.url}/datasets/user/data/discussions/1"
    assert found["texts"] == ["main", "main", "side", "main", "pull", "another", "pull"]
    assert found["heads"] == [c.sha for c in hub.commits("dataset", "user/data", "refs/pr/1")][1::-1]
    assert found["sha"] == found["heads"][1]
    assert found["refs"] == [["refs/heads/main", "refs/heads/side", "refs/heads/a/b"], ["refs/pr/1", "refs/pr/2"]]
    assert [c.sha for c in hub.commits("dataset", "user/data")] == [start]
    assert hub.files("dataset", "user/data", "side") == {"a.json": b"side"}


ACCESS = """
tell(
    create=refused(api.create_repo, "user/more", repo_type="dataset"),
    commit=refused(commit, {"a.parquet": b"rows"}),
    branch=refused(api.create_branch, **repo, branch="side"),
    private=refused(read, "a.json"),
    info=refused(api.repo_info, **repo),
    public=refused(read, "a.json", repo_id="user/public"),
    absent=refused(api.repo_info, "user/absent"),
    who=refused(api.whoami),
)
"""


def test_nothing_is_written_and_nothing_private_read_without_the_token(hub, client):
    hub.token = TOKEN
    hub.add("dataset", "user/public", {"a.json": "public"})
    client('tell(url=api.create_repo(**repo, private=True)); commit({"a.json": b"private"})', token=TOKEN)
    assert hub.repositories["dataset", "user/data"].private
    before = {path: repository.commits.copy() for path, repository in hub.repositories.items()}
    without = client(ACCESS)
    assert without.pop("create") == ["HfHubHTTPError", 401]
    assert without.pop("public") is None
    assert without.pop("who") == ["LocalTokenNotFoundError", None]
    assert list(without.values()) == [["RepositoryNotFoundError", 401]] * 5
    assert hub.tokens == {TOKEN}
    wrong = client(ACCESS, token="hf_wrong")
    assert list(wrong.values()) == [["HfHubHTTPError", 401]] * 8
    assert hub.tokens == {TOKEN, "hf_wrong"}
    assert {path: repository.commits for path, repository in hub.repositories.items()} == before
    right = client(ACCESS, token=TOKEN)
    assert right.pop("absent") == ["RepositoryNotFoundError", 404]
    assert right == dict.fromkeys(right)
    assert hub.files("dataset", "user/data")["a.parquet"] == b"rows"


def test_a_commit_whose_answer_is_lost_is_made(hub, client):
    hub.add("dataset", "user/data", {"a.json": "0"})
    hub.fail(503, times=1, match="/commit/main", late=True)
    hub.drop(times=1, match="/commit/main", late=True)
    hub.fail(503, times=1, match="/commit/main")
    found = client("""
tell(lost=[refused(commit, {"a.json": data}, title=data.decode()) for data in (b"1", b"2", b"3", b"4")])
""")
    assert found["lost"] == [["HfHubHTTPError", 503], ["RemoteProtocolError", None], ["HfHubHTTPError", 503], None]
    assert [commit.title for commit in hub.commits("dataset", "user/data")][:-1] == ["4", "2", "1"]


def test_a_fault_strikes_one_method_and_brings_its_headers(hub, client):
    hub.add("dataset", "user/data", {"a.json": "0"})
    hub.fail(429, times=2, match="/preupload/", method="POST", headers={"Retry-After": "7"})
    hub.drop(times=1, method="PUT")
    hub.fail(500, match="a.json", method="PUT")
    hub.fail(429, match="/commit/", method="POST", headers={"Retry-After": "7"})
    found = client("""
waits = []
time.sleep = waits.append
text = read("a.json")
try:
    commit({"a.parquet": b"rows"})
except Exception as error:
    tell(text=text, waits=waits, status=error.response.status_code, header=error.response.headers["Retry-After"])
""")
    assert found == {"text": "0", "waits": [8, 8, 1], "status": 429, "header": "7"}
    paths = [path.split("/")[-2] for method, path in hub.requests if method in ("POST", "PUT")]
    assert paths == ["preupload"] * 3 + ["objects"] + ["data"] * 2 + ["commit"]


def test_a_large_file_is_taken_only_whole_and_committed_only_once_it_is_there(hub):
    hub.add("dataset", "user/data", {"a.json": "0"})
    oid = sha256(b"rows").hexdigest()
    connection = HTTPConnection("127.0.0.1", hub.server.server_port)

    def ask(method: str, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def commit() -> int:
        lines = [
            {"key": "header", "value": {"summary": "s"}},
            {"key": "lfsFile", "value": {"path": "a.parquet", "algo": "sha256", "oid": oid, "size": 4}},
        ]
        return ask("POST", "/api/datasets/user/data/commit/main", "\n".join(map(json.dumps, lines)))[0]

    def upload() -> dict[str, Any] | None:
        asked = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": 4}]})
        _, answer = ask("POST", "/datasets/user/data.git/info/lfs/objects/batch", asked)
        return json.loads(answer)["objects"][0].get("actions")

    assert commit() == 400
    path = upload()["upload"]["href"].removeprefix(hub.url)
    assert ask("PUT", path, b"row")[0] == 400
    assert ask("PUT", path, b"rows", {"Authorization": f"Bearer {TOKEN}"})[0] == 400
    assert commit() == 400
    assert ask("PUT", path, b"rows")[0] == 200
    assert upload() is None
    assert commit() == 200
    assert hub.files("dataset", "user/data") == {"a.json": b"0", "a.parquet": b"rows"}
    connection.close()


def test_what_datasets_pushes_is_what_it_loads(hub, client):
    hub.token = TOKEN
    found = client(
        """
import io
from datasets import Dataset, load_dataset

def rows(*values):
    return Dataset.from_dict({"a": list(values)})

rows(1, 2).push_to_hub("user/data", "one", private=True)
rows(3).push_to_hub("user/data", "two", split="test")
rows(1, 2, 3).push_to_hub("user/data", "one")
pull = rows(4).push_to_hub("user/data", "one", create_pr=True)
rows(5).push_to_hub("user/data", "two", split="test", revision="side")

buffer = io.BytesIO()
rows(6, 7).to_parquet(buffer)
card = b"---\\nconfigs:\\n- config_name: x\\n  data_files: p/*.parquet\\n---\\n"
plain = {"repo_id": "user/plain", "repo_type": "dataset"}
api.create_repo(**plain)
commit({"README.md": card, "p/a.parquet": buffer.getvalue(), "j.json": b"[8]"}, **plain)

def load(*args, **settings):
    return {split: part["a"][:] for split, part in load_dataset(*args, **settings).items()}

tell(
    one=load("user/data", "one"),
    two=load("user/data", "two"),
    pull=load("user/data", "one", revision=pull.pr_revision),
    side=load("user/data", "two", revision="side"),
    x=load("user/plain", "x"),
    y=json.loads(read("j.json", repo_id="user/plain")),
)
""",
        token=TOKEN,
    )
    assert found == {
        "one": {"train": [1, 2, 3]},
        "two": {"test": [3]},
        "pull": {"train": [4]},
        "side": {"test": [5]},
        "x": {"train": [6, 7]},
        "y": [8],
    }
    assert hub.repositories["dataset", "user/data"].private
    assert hub.tokens == {TOKEN}
    assert len(hub.commits("dataset", "user/data")) == 4
    assert sorted(hub.files("dataset", "user/data")) == [
        ".gitattributes",
        "README.md",
        "one/train-00000-of-00001.parquet",
        "two/test-00000-of-00001.parquet",
    ]
