"""What users of push_to_hub can rely on: a dataset that trains, explains itself, and is never left by half."""

import getpass
import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from hub_scripts import REPOSITORY, run
from loopback_hub import LoopbackHub

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    push_to_hub,
    save_llamafactory,
    split_by_prompt,
)
from t2s_pref.card import BEGIN, END, TAG

FILES = demo_files()
TOKEN = "hf_sesameSesameSesame"
LOAD = "pairs = load_from_disk(given['pairs'])"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Proven pairs of the bundled model, with all that the steps noted."""
    home = tmp_path_factory.mktemp("sampled")
    rows = load_sft(FILES.train).select(range(16))
    settings = SamplingSettings(num_rejects=2, max_new_tokens=96, round=1)
    engine = TransformersEngine(FILES.model, device="cpu")
    rows = generate_rejected(rows, engine, settings, databases=FILES.databases, cache_dir=home)
    pairs = explode_rejected(rows, dedup="normalized", cache_dir=home)
    assert len(pairs) > 10
    return pairs


@pytest.fixture(scope="module")
def saved(pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pairs"
    pairs.save_to_disk(folder)
    return folder


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def card(hub: LoopbackHub, repo_id: str = "user/pairs", revision: str = "main") -> tuple[dict, str]:
    """The YAML and the text of a card."""
    text = hub.files("dataset", repo_id, revision)["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def rows_of(hub: LoopbackHub, folder: str, repo_id: str = "user/pairs") -> int:
    files = hub.files("dataset", repo_id)
    return sum(pq.read_table(io.BytesIO(files[name])).num_rows for name in files if name.startswith(f"{folder}/"))


def test_what_was_pushed_loads_for_trl_for_llamafactory_and_for_this_package(hub, saved, pairs, tmp_path):
    script = f"""{LOAD}
push(pairs)
default, alpaca = load_dataset("user/pairs", split="train"), load_dataset("user/pairs", "alpaca", split="train")
results += [default.column_names, default[0], alpaca.to_list(), load_sft("user/pairs", split="train").to_list()]
again = load_pairs("user/pairs", split="train")
results += [again.to_list(), [each["step"] for each in lineage.records(again)]]
verified = verify_rejected(again, given["databases"], cache_dir=given["cache"])
results += [verified["verdict"][:], alpaca["verdict"][:]]
"""
    _, columns, first, alpaca, rows, again, steps, *verdicts = run(
        hub, tmp_path, script, pairs=saved, databases=FILES.databases, cache=tmp_path / "cache"
    )
    row = pairs[0]
    assert {"prompt", "chosen", "rejected"} <= set(columns)
    assert first["prompt"] == [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]
    assert first["chosen"] == [{"role": "assistant", "content": row["chosen"]}]
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    for name in ("instruction", "input", "output", "chosen", "rejected", "verdict", "db_id", "round", "policy_hash"):
        assert [each[name] for each in alpaca] == pairs[name][:]
    # the supervised rows under the pairs, each once
    assert [each["source_index"] for each in rows] == list(dict.fromkeys(pairs["source_index"]))
    assert all(set(each) == {"instruction", "input", "output", "db_id", "source_index"} for each in rows)
    for name in ("instruction", "input", "chosen", "rejected", "adapter"):
        assert [each[name] for each in again] == pairs[name][:]
    assert steps[:3] == ["generate_rejected", "verify_rejected", "explode_rejected"]
    assert verdicts[0] == verdicts[1] == pairs["verdict"][:]


def test_the_card_tells_how_the_pairs_came_about(hub, saved, pairs, tmp_path):
    script = f"{LOAD}\npush(pairs, license='cc-by-4.0', source_datasets=['a/b'])"
    run(hub, tmp_path, script, pairs=saved)
    head, text = card(hub)
    assert head["license"] == "cc-by-4.0"
    assert head["source_datasets"] == ["a/b"]
    assert {"dpo", "preference", "text-to-sql", "sql", "synthetic"} <= set(head["tags"])
    assert head["task_categories"] == ["text-generation"]
    assert head["size_categories"] == ["n<1K"]
    assert {config["config_name"] for config in head["configs"]} == {"default", "alpaca"}
    assert "**proven wrong by execution**" in text
    assert re.search(r"\| seed \| 1234 \|", text)
    assert re.search(r"\| policy \| `model` with the content hash `[0-9a-f]{32}` \|", text)
    assert "| `template` in LLaMA-Factory | qwen3_nothink |" in text
    assert f"| kept as pairs | {len(pairs)} |" in text
    assert f"| train | {len(pairs)} | {len(set(pairs['input']))} | " in text
    assert "`wrong_result`" in text
    assert 'load_dataset("user/pairs", "alpaca", split="train")' in text
    assert 'dataset_dir: "REMOTE:user/pairs"' in text
    shortest = min(pairs, key=lambda row: len(row["instruction"] + row["input"] + row["chosen"] + row["rejected"]))
    assert shortest["rejected"] in text


def test_the_card_names_the_dataset_that_the_rows_were_loaded_from(hub, tmp_path):
    rows = [{"instruction": "", "input": f"Question {number}?", "output": f"SELECT {number}"} for number in range(3)]
    sha = hub.add("dataset", "them/sft", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    script = """
rows = load_sft("them/sft", split="train").filter(lambda row: "2" not in row["input"])
push(rows.map(lambda row: {"chosen": row["output"], "rejected": "SELECT 7"}))
"""
    run(hub, tmp_path, script)
    head, text = card(hub)
    assert head["source_datasets"] == ["them/sft"]
    assert f"| source | `them/sft` at `{sha}` |" in text


def test_pairs_that_were_not_run_are_not_called_proven(hub, tmp_path):
    script = """
row = {"instruction": "", "input": "One?", "chosen": "SELECT 1", "rejected": "SELECT 2"}
push(Dataset.from_list([row]))
"""
    run(hub, tmp_path, script)
    head, text = card(hub)
    assert "No `verdict` says that a `rejected` was run, so **it may be right**." in text
    assert "Who wrote them is not noted." in text
    assert "proven wrong" not in text
    assert "synthetic" not in head["tags"]


def test_no_path_no_user_and_no_token_gets_into_what_is_pushed(hub, saved, tmp_path):
    hub.token = TOKEN
    script = f"{LOAD}\npush(pairs, private=True)"
    (pushed,) = run(hub, tmp_path, script, token=TOKEN, pairs=saved)
    assert isinstance(pushed, list)
    assert hub.repositories["dataset", "user/pairs"].private
    assert hub.tokens == {TOKEN}
    secrets = {TOKEN, str(Path.home()), str(tmp_path), str(REPOSITORY), FILES.model, f"/{getpass.getuser()}/"}
    (commit, *_) = hub.commits("dataset", "user/pairs")
    said = [*commit.files.values(), commit.title.encode(), commit.description.encode()]
    for content in said:
        assert not [secret for secret in secrets if secret.encode() in content]
    # Parquet is compressed: its cells and its metadata are looked at as text
    for name, content in commit.files.items():
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            shown = json.dumps(table.to_pylist()) + str(table.schema.metadata)
            assert not [secret for secret in secrets if secret in shown]


def test_a_second_push_replaces_what_is_ours_and_keeps_all_else(hub, saved, pairs, tmp_path):
    run(hub, tmp_path, f"{LOAD}\npush(pairs, test_size=0.3, license='mit')", pairs=saved)
    files = hub.files("dataset", "user/pairs")
    # somebody adds a configuration, a file, an entry, tags and words of their own
    head, body = card(hub)
    head["configs"].append({"config_name": "raw", "data_files": "raw/*.parquet"})
    head["pretty_name"], head["tags"] = "My pairs", [*head["tags"], "mine"]
    body = body.replace(BEGIN, f"Read me first.\n\n{BEGIN}").replace(END, f"{END}\n\nCite me.")
    info = json.loads(files["dataset_info.json"])
    info["theirs"] = {"hf_hub_url": "a/b"}
    changed = {
        **files,
        "README.md": f"---\n{yaml.safe_dump(head)}---\n{body}",
        "raw/a.parquet": files["alpaca/train-00000-of-00001.parquet"],
        "dataset_info.json": json.dumps(info),
    }
    hub.add("dataset", "user/pairs", changed)
    script = f"""{LOAD}
push(pairs.select(range(5)))
push(pairs.select(range(5)))
results += [load_dataset("user/pairs", "raw", split="train").num_rows]
"""
    first, second, raw = run(hub, tmp_path, script, pairs=saved)
    assert first == second  # nothing has changed, so there is no commit
    assert raw == len(pq.read_table(io.BytesIO(files["alpaca/train-00000-of-00001.parquet"])))
    assert rows_of(hub, "alpaca") == rows_of(hub, "data") == 5
    head, body = card(hub)
    assert {config["config_name"] for config in head["configs"]} == {"default", "alpaca", "raw"}
    assert head["pretty_name"] == "My pairs"
    assert head["license"] == "mit"
    assert "mine" in head["tags"]
    assert "Read me first." in body
    assert "Cite me." in body
    assert body.count(BEGIN) == body.count(END) == 1
    assert "5 preference pairs" in body
    files = hub.files("dataset", "user/pairs")
    assert "raw/a.parquet" in files
    assert not [name for name in files if "test-" in name]
    info = json.loads(files["dataset_info.json"])
    assert info["theirs"] == {"hf_hub_url": "a/b"}
    assert info["pairs"]["subset"] == "alpaca"
    assert info["pairs"]["ranking"] is True


def test_a_hub_that_stumbles_is_asked_again(hub, saved, pairs, tmp_path):
    hub.fail(503, times=1, match="/repos/create")
    hub.fail(503, times=1, match="/datasets/user/looked-up$")
    hub.fail(503, times=1, match="/user/prepared/preupload/")
    hub.fail(503, times=1, match="lfs-store/.*/user/stored/")
    for status in (409, 412, 429, 500, 503):
        hub.fail(status, times=1, match="/user/committed/commit/", headers={"Retry-After": "0.1"})
    hub.drop(times=1, match="/user/committed/commit/")
    names = ["created", "looked-up", "prepared", "stored", "committed"]
    script = f"{LOAD}\nfor name in given['names']: push(pairs, f'user/{{name}}')"
    for name, pushed in zip(names, run(hub, tmp_path, script, pairs=saved, names=names), strict=True):
        assert isinstance(pushed, list), pushed
        assert rows_of(hub, "alpaca", f"user/{name}") == len(pairs)
        assert [commit.title for commit in hub.commits("dataset", f"user/{name}")][1:] == ["initial commit"]
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_push_whose_answer_is_lost_is_not_made_twice(hub, saved, pairs, tmp_path):
    hub.fail(times=1, match="/user/failed/commit/", late=True)
    hub.drop(times=1, match="/user/cut/commit/", late=True)
    for pushed in run(hub, tmp_path, f"{LOAD}\npush(pairs, 'user/failed')\npush(pairs, 'user/cut')", pairs=saved):
        assert isinstance(pushed, list), pushed
    for name in ("user/failed", "user/cut"):
        assert len(hub.commits("dataset", name)) == 2
        assert rows_of(hub, "data", name) == len(pairs)


def test_a_push_that_fails_leaves_the_dataset_as_it_was_and_says_how_to_go_on(hub, saved, pairs, tmp_path):
    statuses = [409, 412, 429, 500]
    script = f"{LOAD}\nfor status in given['statuses']: push(pairs.select(range(given['rows'])), f'user/{{status}}')"
    run(hub, tmp_path, script, pairs=saved, statuses=statuses, rows=len(pairs))
    before = {status: hub.files("dataset", f"user/{status}") for status in statuses}
    for status in statuses:
        hub.fail(status, match=f"/user/{status}/commit/")
    refused = run(hub, tmp_path, script, pairs=saved, statuses=statuses, rows=3)
    for status, failed in zip(statuses, refused, strict=True):
        assert failed.startswith(f"ConnectionError: pushing to user/{status}: the Hub answered {status} at try 8 of 8.")
        assert "Push again to go on" in failed
        assert "\n" not in failed
    assert {status: hub.files("dataset", f"user/{status}") for status in statuses} == before
    hub.heal()
    run(hub, tmp_path, script, pairs=saved, statuses=statuses, rows=3)
    assert {rows_of(hub, "alpaca", f"user/{status}") for status in statuses} == {3}


def test_two_that_push_at_once_both_get_through(hub, saved, tmp_path):
    script = f"""{LOAD}
import threading
threads = [threading.Thread(target=push, args=(pairs.select(range(n)),)) for n in (4, 5, 6)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    pushed = run(hub, tmp_path, script, pairs=saved)
    assert all(isinstance(each, list) for each in pushed), pushed
    commits = hub.commits("dataset", "user/pairs")
    assert {commit.sha for commit in commits} >= {oid for oid, _ in pushed}
    for commit in commits[:-1]:  # each of them whole
        tables = [
            pq.read_table(io.BytesIO(commit.files[f"{of}/train-00000-of-00001.parquet"])) for of in ("data", "alpaca")
        ]
        assert tables[0].num_rows == tables[1].num_rows
        assert f"{tables[0].num_rows} preference pairs" in commit.files["README.md"].decode()


def test_a_pull_request_and_a_branch_leave_main_alone(hub, saved, tmp_path):
    script = f"""{LOAD}
push(pairs)
push(pairs.select(range(4)), create_pr=True)
push(pairs.select(range(5)), revision="next")
for revision in ("refs/pr/1", "next", "main"):
    results.append(len(load_dataset("user/pairs", "alpaca", split="train", revision=revision)))
push(pairs.select(range(6)), revision="refs/pr/1")
"""
    main, request, _, *sizes, _ = run(hub, tmp_path, script, pairs=saved)
    assert sizes[:2] == [4, 5]
    assert request[1].endswith("/discussions/1")
    assert hub.commits("dataset", "user/pairs")[0].sha == main[0]
    assert b"6 preference pairs" in hub.files("dataset", "user/pairs", "refs/pr/1")["README.md"]


def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub, saved, tmp_path):
    hub.add("dataset", "user/theirs", {"train.jsonl": '{"a": 1}\n'})
    hub.add("dataset", "user/other", {"README.md": "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n"})
    hub.add("dataset", "user/public", {"README.md": "Soon."})
    hub.add("dataset", "user/broken", {"README.md": "---\na: [\n---\n"})
    hub.token = TOKEN
    script = f"""{LOAD}
for repo_id in ("user/theirs", "user/other", "user/broken", "pairs", "a b/c", "user/pairs/more", 7):
    push(pairs, repo_id)
push(pairs, "user/public", private=True)
push(pairs, "user/public", revision="refs/heads/x")
"""
    before = {name: hub.commits("dataset", name)[0].sha for name in ("user/theirs", "user/other", "user/public")}
    theirs, other, broken, bare, blank, more, number, public, revision = run(hub, tmp_path, script, TOKEN, pairs=saved)
    assert "user/theirs holds a dataset that t2s_pref did not push (train.jsonl)" in theirs
    assert "user/other holds a dataset that t2s_pref did not push (default)" in other
    assert "cannot be read" in broken
    for message in (bare, blank, more, number):
        assert "it must be owner/name" in message
    assert "user/public exists and is public" in public
    assert "it must be the name of a branch" in revision
    (without,) = run(hub, tmp_path / "other", f"{LOAD}\npush(pairs)", pairs=saved)
    assert "the Hub answered 401; set HF_TOKEN to a token that may write" in without
    for message in (theirs, other, broken, bare, blank, public, revision, without):
        assert message.startswith("UserError: ")
        assert "\n" not in message
        assert TOKEN not in message
    assert {name: hub.commits("dataset", name)[0].sha for name in before} == before


def test_a_card_of_words_only_keeps_them(hub, saved, tmp_path):
    hub.add("dataset", "user/pairs", {"README.md": "# Soon\n\nPairs will be here."})
    run(hub, tmp_path, f"{LOAD}\npush(pairs)", pairs=saved)
    _, text = card(hub)
    assert text.strip().startswith("# Soon\n\nPairs will be here.\n\n" + BEGIN)


def test_preference_data_from_elsewhere_is_loaded_and_verified(hub, tmp_path):
    gold, wrong = "SELECT count(*) FROM book", "SELECT count(*) FROM author"
    turns = [{"role": "user", "content": "How many books?"}]
    sides = {"chosen": gold, "rejected": wrong}
    trl = {"prompt": turns, **{side: [{"role": "assistant", "content": sql}] for side, sql in sides.items()}}
    alpaca = {"instruction": "How many books?", "input": "", **sides}
    hub.add("dataset", "them/trl", {"train.jsonl": json.dumps({**trl, "db_id": "library"}) + "\n"})
    hub.add("dataset", "them/alpaca", {"train.jsonl": json.dumps({**alpaca, "db_id": "library"}) + "\n"})
    script = """
for name in ("them/trl", "them/alpaca"):
    pairs = load_pairs(name, split="train")
    results += [pairs[0], verify_rejected(pairs, given["databases"], cache_dir=given["cache"])["verdict"][:]]
    cleaned = clean_preferences(name, given["databases"], given["clean"], split="train", cache_dir=given["cache"])
    results.append(cleaned.kept)
"""
    found = run(hub, tmp_path, script, databases=FILES.databases, cache=tmp_path / "c", clean=tmp_path / "clean.json")
    for row, verdicts, kept in (found[:3], found[3:]):
        assert row == {**alpaca, "db_id": "library"}
        assert verdicts == ["wrong_result"]
        assert kept == 1


def test_a_card_claims_what_the_verdicts_of_its_rows_say_and_no_more(hub, saved, tmp_path):
    script = f"""{LOAD}
other = Dataset.from_list([{{"instruction": "", "input": "One?", "chosen": "SELECT 1", "rejected": "SELECT 2"}}])
push(merge_pairs(pairs, other), "user/merged")
push(DatasetDict(train=pairs, test=other), "user/splits")
right = pairs.map(lambda row, place: {{"verdict": "equivalent" if place == 0 else row["verdict"]}}, with_indices=True)
push(right, "user/right")
# another file under the name of an old one, by this package and by another tool
save_llamafactory(pairs, given["file"], "old")
save_llamafactory(other, given["file"], "new")
push(load_pairs(given["file"]), "user/stale")
save_llamafactory(pairs, given["file"])
open(given["file"], "w").write(json.dumps(other.to_list()))
push(load_pairs(given["file"]), "user/rewritten")
# the pairs of another tool, verified here
push(verify_rejected(other, given["databases"] + "/library/library.sqlite", cache_dir=given["cache"]), "user/verified")
"""
    file = tmp_path / "pairs.json"
    pushed = run(hub, tmp_path, script, pairs=saved, file=file, databases=FILES.databases, cache=tmp_path / "c")
    assert all(isinstance(each, list) for each in pushed), pushed
    for repo_id in ("user/merged", "user/splits", "user/right"):
        _, text = card(hub, repo_id)
        assert "**proven wrong by execution**" not in text
        assert "were proven wrong by execution, as `verdict` says; **the others may be right**." in text
    for repo_id in ("user/stale", "user/rewritten"):
        _, text = card(hub, repo_id)
        assert "proven wrong" not in text
        assert "generate_rejected" not in text
    _, text = card(hub, "user/verified")
    assert "Who wrote them is not noted. Each `rejected` was **proven wrong by execution**" in text


def test_what_is_not_ours_is_never_lost(hub, saved, tmp_path):
    parquet = io.BytesIO()
    pq.write_table(Dataset.from_list([{"a": 1}]).data.table, parquet)
    raw = {"config_name": "raw", "data_files": [{"split": "train", "path": "data/train-*"}]}
    main = {"config_name": "main", "default": True, "data_files": "main/*.parquet"}
    ours = f"tags: [{TAG}]\n"

    def readme(*configs, head=""):
        return f"---\n{head}{yaml.safe_dump({'configs': list(configs)})}---\n"

    name = "data/train-00000-of-00001.parquet"
    hub.add("dataset", "user/raw", {"README.md": readme(raw), name: parquet.getvalue()})
    hub.add("dataset", "user/raw-too", {"README.md": readme(raw, head=ours), name: parquet.getvalue()})
    hub.add("dataset", "user/main", {"README.md": readme(main, head=ours)})
    hub.add("dataset", "user/pictures", {"a.tsv": "1\t2", "b.png": b"png"})
    hub.add("dataset", "user/registry", {"dataset_info.json": '{"theirs": {"hf_hub_url": "a/b"}, }'})
    hub.add("dataset", "user/marks", {"README.md": f"Mine.\n{BEGIN}\nOurs.\nMine too.\n"})
    hub.add("dataset", "user/odd", {"README.md": "---\nconfigs: 3\n---\n"})
    hub.add("dataset", "user/latin", {"README.md": "Caf\xe9".encode("latin-1")})
    names = [repo_id for _, repo_id in hub.repositories]
    before = {repo_id: hub.files("dataset", repo_id) for repo_id in names}
    script = f"{LOAD}\nfor name in given['names']: push(pairs, name)"
    refused = run(hub, tmp_path, script, pairs=saved, names=names)
    for message in refused:
        assert message.startswith("UserError: "), message
        assert "\n" not in message
    assert {repo_id: hub.files("dataset", repo_id) for repo_id in names} == before


def test_what_can_be_kept_is_kept(hub, saved, tmp_path):
    theirs = {"theirs": {"hf_hub_url": "a/b"}}
    hub.add("dataset", "user/bom", {"README.md": "\ufeff---\nlicense: mit\ntags: sql\n---\nMine.\n"})
    hub.add("dataset", "user/registry", {"dataset_info.json": "\ufeff" + json.dumps(theirs)})
    script = f"""{LOAD}
end = given["end"]
push(pairs, "user/bom")
push(pairs, "user/registry", test_size=0.4)
push(pairs, "user/registry")
marked = pairs.select([0]).map(lambda row: {{"input": end + given["begin"] + row["input"]}})
for _ in range(3):
    push(marked, "user/marked")
"""
    pushed = run(hub, tmp_path, script, pairs=saved, begin=BEGIN, end=END)
    assert all(isinstance(each, list) for each in pushed), pushed
    head, text = card(hub, "user/bom")
    assert (head["license"], head["tags"][0]) == ("mit", "sql")
    assert text.strip().startswith("Mine.")
    # no entry is left of a split that is not there any more
    assert set(json.loads(hub.files("dataset", "user/registry")["dataset_info.json"])) == {"theirs", "registry"}
    _, text = card(hub, "user/marked")
    assert text.count("## How to use it") == text.count(END) == 1


def test_splits_that_differ_in_their_columns_load_all_the_same(hub, tmp_path):
    script = """
row = {"instruction": "", "input": "One?", "chosen": "SELECT 1", "rejected": "SELECT 2"}
train = Dataset.from_list([{**row, "system": None}])
test = Dataset.from_list([{**row, "input": "Two?", "system": "You write SQL.", "db_id": "a"}])
lineage.note(test, step=lineage.SAMPLED, model={"name": "m"}, settings={"enable_thinking": False})
push(DatasetDict(train=train, test=test))
alpaca, default = load_dataset("user/pairs", "alpaca"), load_dataset("user/pairs")
results += [alpaca["train"][0], alpaca["test"][0]["system"], default["train"].features == default["test"].features]
for name in ("train-1", "../x", "", "all"):
    push(DatasetDict({name: train}), "user/odd")
push(Dataset.from_list([{**row, "db_id": ["a"]}]), "user/odd")
"""
    _, row, system, same, *refused = run(hub, tmp_path, script)
    assert row["system"] is None
    assert row["db_id"] is None
    assert system == "You write SQL."
    assert same
    assert all(message.startswith("UserError: ") and "\n" not in message for message in refused)
    assert ("dataset", "user/odd") not in hub.repositories


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, saved, tmp_path):
    names = ["user/failed", "user/cut"]
    run(hub, tmp_path, f"{LOAD}\nfor name in given['names']: push(pairs, name)", pairs=saved, names=names)
    hub.fail(times=1, match="/user/failed/commit/", late=True)
    hub.drop(times=1, match="/user/cut/commit/", late=True)
    script = f"{LOAD}\nfor name in given['names']: push(pairs.select([0, 1]), name, create_pr=True)"
    for name, failed in zip(names, run(hub, tmp_path, script, pairs=saved, names=names), strict=True):
        assert failed.startswith("LostError: ")
        assert "see whether it is among the discussions there" in failed
        assert "refs/pr/1" in hub.repositories["dataset", name].branches
        assert "refs/pr/2" not in hub.repositories["dataset", name].branches


def test_verifying_a_dataset_of_one_split_needs_no_name_for_it(hub, saved, tmp_path):
    script = f"""{LOAD}
push(pairs)
results.append(clean_preferences("user/pairs", given["databases"], given["clean"], cache_dir=given["cache"]).kept)
push(pairs, "user/two", test_size=0.5)
results.append(attempt(clean_preferences, "user/two", given["databases"], given["clean"]))
"""
    _, kept, _, refused = run(
        hub, tmp_path, script, pairs=saved, databases=FILES.databases, clean=tmp_path / "c.json", cache=tmp_path / "c"
    )
    assert kept > 0
    assert refused == "UserError: user/two has the splits ['train', 'test']; choose one with split= (--split)."


def test_golds_come_back_as_sql_and_rows_of_other_databases_stay_apart(hub, tmp_path):
    script = """
row = {"instruction": "", "input": "How many?", "chosen": "One table.\\n\\n```sql\\nSELECT 1\\n```", "rejected": "b"}
rows = [{**row, "db_id": "a"}, {**row, "db_id": "a", "rejected": "c"}, {**row, "db_id": "b"}]
rows.append({**row, "input": "Whose?", "db_id": "a", "chosen": "SELECT 2", "chosen_from": "own"})
push(Dataset.from_list([{"chosen_from": "gold", **each} for each in rows]))
results.append(load_sft("user/pairs", split="train").to_list())
"""
    _, rows = run(hub, tmp_path, script)
    assert [(row["db_id"], row["output"]) for row in rows] == [("a", "SELECT 1"), ("b", "SELECT 1")]


def test_what_was_loaded_once_loads_offline(hub, saved, tmp_path):
    script = f"""{LOAD}
push(pairs)
results += [len(load_sft("user/pairs", split="train")), len(load_dataset("user/pairs", split="train"))]
"""
    _, rows, _ = run(hub, tmp_path, script, pairs=saved)
    script = 'results += [len(load_sft("user/pairs", split="train")), len(load_pairs("user/pairs", split="train"))]'
    assert run(hub, tmp_path, script, offline=True) == [rows, len(Dataset.load_from_disk(saved))]


def test_supervised_rows_are_pushed_too(hub, tmp_path):
    script = """
rows = load_sft(given["train"]).select(range(6))
push(rows, "user/golds")
default = load_dataset("user/golds", split="train")
results += [default.column_names, load_sft("user/golds", split="train").to_list() == rows.to_list()]
"""
    _, columns, same = run(hub, tmp_path, script, train=FILES.train)
    assert {"prompt", "completion"} <= set(columns)
    assert same
    head, text = card(hub, "user/golds")
    assert "dpo" not in head["tags"]
    assert "6 supervised rows" in text
    info = json.loads(hub.files("dataset", "user/golds")["dataset_info.json"])
    assert info["golds"] == {
        "hf_hub_url": "user/golds",
        "subset": "alpaca",
        "split": "train",
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    }


def test_the_command_line_pushes_a_file_with_what_its_run_noted(hub, pairs, tmp_path):
    save_llamafactory(pairs, tmp_path / "my_dpo.json")
    script = """
from t2s_pref.cli import main
results.append(main(["push", "--data", given["data"], "--repo-id", "user/my_dpo", "--test-size", "0.25", "--private"]))
results.append(main(["push", "--data", given["data"], "--repo-id", "my_dpo"]))
"""
    done, refused = run(hub, tmp_path, script, data=tmp_path / "my_dpo.json")
    assert (done, refused) == (0, 2)
    _, text = card(hub, "user/my_dpo")
    assert "| seed | 1234 |" in text
    assert "**proven wrong by execution**" in text
    assert "No prompt is in two splits." in text
    assert set(json.loads(hub.files("dataset", "user/my_dpo")["dataset_info.json"])) == {"my_dpo", "my_dpo_test"}
    assert hub.repositories["dataset", "user/my_dpo"].private


# Splits


def prompts_of(dataset: Dataset) -> set[str]:
    return set(dataset["input"])


def test_no_prompt_is_in_two_splits(pairs):
    split = split_by_prompt(pairs, test_size=0.4)
    assert len(split["train"]) + len(split["test"]) == len(pairs)
    assert not prompts_of(split["train"]) & prompts_of(split["test"])
    assert split["train"].info.description == pairs.info.description


def test_a_dataset_that_grows_keeps_its_test_prompts_out_of_training():
    rows = [{"instruction": "", "input": f"Question {number}"} for number in range(400)]
    few = split_by_prompt(Dataset.from_list(rows[:200]), 0.25)
    many = split_by_prompt(Dataset.from_list(rows[::-1]), 0.25)
    assert prompts_of(few["test"]) <= prompts_of(many["test"])
    assert prompts_of(few["train"]) <= prompts_of(many["train"])
    assert 60 < len(many["test"]) < 140
    assert prompts_of(split_by_prompt(Dataset.from_list(rows), 0.25, seed=1)["test"]) != prompts_of(many["test"])


@pytest.mark.parametrize("size", [0, 1, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(pairs, size):
    with pytest.raises(UserError, match="test_size is"):
        split_by_prompt(pairs, size)


def test_rows_that_would_leak_or_mislead_are_refused_before_the_hub_is_asked(pairs):
    halves = pairs.train_test_split(test_size=0.5, seed=3)
    with pytest.raises(UserError, match="has a prompt that is in 'train' too"):
        push_to_hub(halves, "user/pairs")
    with pytest.raises(UserError, match="has the splits"):
        push_to_hub(split_by_prompt(pairs, 0.5), "user/pairs", test_size=0.5)
    with pytest.raises(UserError, match="explode_rejected first"):
        push_to_hub(pairs.map(lambda row: {"rejected": [row["rejected"]]}), "user/pairs")
    with pytest.raises(UserError, match="Row 0: 'rejected' equals 'chosen'"):
        push_to_hub(pairs.map(lambda row: {"rejected": row["chosen"]}), "user/pairs")
    with pytest.raises(UserError, match="has no rows"):
        push_to_hub(pairs.select([]), "user/pairs")
    assert TAG
