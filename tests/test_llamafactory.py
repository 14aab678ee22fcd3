"""What `save_llamafactory` promises: files that LLaMA-Factory reads, whole or not at all, and no entry ever lost."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from filelock import FileLock

import t2s_pref
from t2s_pref.errors import UserError
from t2s_pref.llamafactory import check_destination, save_llamafactory
from t2s_pref.load import load_sft

PAIR = {"instruction": "Answer with SQL.", "input": "How many?", "chosen": "SELECT 1", "rejected": "SELECT 2"}
SUPERVISED = {"instruction": "Answer with SQL.", "input": "How many?", "output": "SELECT 1"}
PAIR_COLUMNS = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
SUPERVISED_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
REPOSITORY = Path(t2s_pref.__file__).parents[1]
# As the data of LLaMA-Factory itself has it: several kinds of source, order of their own.
OTHERS = {"z": {"hf_hub_url": "a/b"}, "identity": {"file_name": "identity.json"}, "a": {"script_url": "c", "tags": {}}}


def pairs(*rows: dict[str, Any], **columns: Any) -> Dataset:
    return Dataset.from_list([{**PAIR, **row} for row in rows or ({},)], **columns)


def info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset_info.json").read_text(encoding="ascii"))


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Save what must be refused; return the message. Nothing may have been written."""

    def save(dataset: Any, file_name: str = "my_dpo.json", **arguments: Any) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError) as caught:
            save_llamafactory(dataset, tmp_path / file_name, **arguments)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return save


# The data file


def test_pairs_are_written_as_preference_data(tmp_path):
    path = save_llamafactory(pairs({}, {"rejected": "SELECT 3"}), tmp_path / "my_dpo.json")
    assert path == tmp_path / "my_dpo.json"
    assert json.loads(path.read_text()) == [PAIR, {**PAIR, "rejected": "SELECT 3"}]
    assert info(tmp_path) == {"my_dpo": {"file_name": "my_dpo.json", "ranking": True, "columns": PAIR_COLUMNS}}


def test_rows_without_rejects_are_written_as_supervised_data(tmp_path):
    path = save_llamafactory(Dataset.from_list([SUPERVISED]), str(tmp_path / "my_sft.json"))
    assert json.loads(path.read_text()) == [SUPERVISED]
    entry = {"file_name": "my_sft.json", "formatting": "alpaca", "columns": SUPERVISED_COLUMNS}
    assert info(tmp_path) == {"my_sft": entry}


def test_pairs_that_still_carry_their_gold_are_preference_data_and_other_columns_are_left_out(tmp_path):
    path = save_llamafactory(pairs({"output": "SELECT 1", "source_index": 3, "rejected_index": 0}), tmp_path / "p.json")
    assert json.loads(path.read_text()) == [PAIR]
    assert info(tmp_path)["p"]["ranking"] is True


@pytest.mark.parametrize("row", [PAIR, SUPERVISED], ids=["preference", "supervised"])
def test_system_and_history_are_written_and_listed_where_the_data_has_them(tmp_path, row):
    more = {"system": "You write SQL.", "history": [["a", "b"]], "db_id": "concert"}
    path = save_llamafactory(Dataset.from_list([{**row, **more}]), tmp_path / "rows.json")
    assert json.loads(path.read_text()) == [{**row, **more}]
    columns = info(tmp_path)["rows"]["columns"]
    assert columns == {**columns, "system": "system", "history": "history"}
    assert "db_id" not in columns
    save_llamafactory(Dataset.from_list([row]), tmp_path / "rows.json")
    assert not {"system", "history"} & set(info(tmp_path)["rows"]["columns"])


def test_nulls_are_written_as_the_empty_value_of_the_same_type(tmp_path):
    some = {"system": "s", "history": [["a", "b"]], "db_id": "d"}
    none = {"instruction": None, "input": None, "system": None, "history": None, "db_id": None}
    path = save_llamafactory(pairs(some, none), tmp_path / "p.json")
    empty = {"instruction": "", "input": "", "system": "", "history": [], "db_id": ""}
    assert json.loads(path.read_text()) == [{**PAIR, **some}, {**PAIR, **empty}]


def test_columns_of_nulls_only_are_empty_strings_and_lists(tmp_path):
    path = save_llamafactory(pairs({"input": None, "system": None, "history": None}), tmp_path / "p.json")
    assert json.loads(path.read_text()) == [{**PAIR, "input": "", "system": "", "history": []}]


def test_an_array_is_indented_and_text_is_written_as_it_is(tmp_path):
    odd = {"instruction": "有多少？ é 😀", "chosen": "SELECT a/b\n-- \"x\" \\ '\u2028'\t\x01"}
    text = save_llamafactory(pairs(odd, {}), tmp_path / "p.json").read_text(encoding="utf-8")
    assert text == json.dumps([{**PAIR, **odd}, PAIR], indent=2, ensure_ascii=False) + "\n"
    assert "\\/" not in text
    assert "有多少？ é 😀" in text


def test_an_array_with_histories_is_the_text_of_the_standard_library(tmp_path):
    history = {"history": [["a\n", "b"], ["c", "d"]]}
    text = save_llamafactory(pairs(history, {"history": []}), tmp_path / "p.json").read_text()
    assert text == json.dumps([{**PAIR, **history}, {**PAIR, "history": []}], indent=2) + "\n"


def test_jsonl_is_one_object_a_line(tmp_path):
    rows = [{"input": "a\nb/é"}, {"input": "c"}]
    path = save_llamafactory(pairs(*rows), tmp_path / "p.jsonl")
    lines = path.read_bytes().decode().split("\n")
    assert lines == [json.dumps({**PAIR, **row}, ensure_ascii=False) for row in rows] + [""]
    assert info(tmp_path)["p"]["file_name"] == "p.jsonl"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_any_number_of_rows_is_written_in_order(tmp_path, name):
    rows = [{"chosen": f"SELECT {n}", "rejected": f"SELECT -{n}"} for n in range(2345)]
    path = save_llamafactory(pairs(*rows), tmp_path / name)
    text = path.read_text()
    records = json.loads(text) if name == "rows.json" else [json.loads(line) for line in text.splitlines()]
    assert records == [{**PAIR, **row} for row in rows]


def test_what_was_saved_loads_as_the_same_rows_by_load_sft_and_by_datasets(tmp_path):
    rows = [{**SUPERVISED, "history": [["a", "b"]], "db_id": "2020-01-01"}, {**SUPERVISED, "history": [], "db_id": "x"}]
    dataset = load_sft(Dataset.from_list(rows))
    path = save_llamafactory(dataset, tmp_path / "rows.json")
    assert load_sft(path)._fingerprint == dataset._fingerprint
    assert Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")).to_list() == [
        {key: value for key, value in row.items() if key != "source_index"} for row in dataset.to_list()
    ]


def test_a_selected_or_formatted_dataset_is_written_in_its_own_order(tmp_path):
    rows = pairs(*({"chosen": f"SELECT {n}", "history": [["a", "b"]]} for n in range(4))).select([3, 1])
    path = save_llamafactory(rows.with_format("numpy"), tmp_path / "p.json")
    assert [record["chosen"] for record in json.loads(path.read_text())] == ["SELECT 3", "SELECT 1"]


def test_missing_folders_are_made_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save_llamafactory(pairs(), "~/new/folder/p.json")
    assert path == tmp_path / "new" / "folder" / "p.json"
    assert sorted(os.listdir(path.parent)) == ["dataset_info.json", "p.json"]


def test_the_dataset_is_not_changed(tmp_path):
    dataset = pairs({"history": None})
    before = dataset._fingerprint, dataset[:], dataset.features, dataset.format
    save_llamafactory(dataset, tmp_path / "p.json")
    assert (dataset._fingerprint, dataset[:], dataset.features, dataset.format) == before


# What is refused, with nothing written


def test_rejects_in_lists_are_refused_with_the_way_out(refused):
    message = refused(pairs({"rejected": ["SELECT 2", "SELECT 3"]}))
    assert "Column 'rejected' is List(Value('string')), expected strings" in message
    assert "explode_rejected first" in message
    lists_alone = Dataset.from_list([{**SUPERVISED, "rejected": ["SELECT 2"]}])
    message = refused(lists_alone)
    assert "Column 'chosen' not found" in message
    assert "explode_rejected first" in message
    assert "remove_columns('rejected')" in message


@pytest.mark.parametrize("missing", ["instruction", "input", "chosen", "rejected"])
def test_a_missing_column_of_pairs_is_named(refused, missing):
    assert f"Column '{missing}' not found; columns are [" in refused(pairs().remove_columns(missing))


def test_a_dataset_without_answers_is_refused(refused):
    assert "Column 'output' not found" in refused(pairs().remove_columns(["chosen", "rejected"]))


@pytest.mark.parametrize("name", ["instruction", "input", "chosen", "rejected", "system", "db_id"])
def test_columns_that_are_not_strings_are_refused(refused, name):
    assert f"Column '{name}' is Value('int64'), expected strings" in refused(pairs({name: 3}))


@pytest.mark.parametrize("history", [[["a", "b"], ["c"]], [["a", None]], ["a", "b"], "text"])
def test_a_history_that_is_not_pairs_is_refused(refused, history):
    message = refused(pairs({"history": history}))
    assert "Row 0: column 'history' has" in message
    assert "[user, assistant]" in message


def test_an_empty_dataset_is_refused(refused):
    assert "empty" in refused(pairs().select([]))
    features = Features({name: Value("string") for name in PAIR} | {"rejected": Value("string")})
    assert "empty" in refused(Dataset.from_dict({name: [] for name in PAIR}, features=features))


@pytest.mark.parametrize("name", ["chosen", "rejected"])
@pytest.mark.parametrize(("value", "kind"), [(None, "null"), ("", "blank"), (" \n", "blank")])
def test_an_answer_that_is_null_or_blank_is_refused_by_row(refused, name, value, kind):
    features = Features({column: Value("string") for column in PAIR})
    assert f"Row 1: column '{name}' is {kind}" in refused(pairs({}, {name: value}, features=features))


def test_a_reject_equal_to_the_chosen_answer_is_refused_by_row(refused):
    rows = [{"chosen": f"SELECT {n}", "rejected": "SELECT 1500"} for n in range(2000)]
    assert "Row 1500: 'rejected' equals 'chosen'" in refused(pairs(*rows))


def test_the_filters_that_the_messages_propose_do_mend_it(tmp_path):
    rows = pairs({}, {"rejected": " "}, {"rejected": "SELECT 1"}, {"rejected": None})
    rows = rows.filter(lambda r: (r["rejected"] or "").strip()).filter(lambda r: r["rejected"] != r["chosen"])
    assert json.loads(save_llamafactory(rows, tmp_path / "p.json").read_text()) == [PAIR]


def test_each_split_of_a_dict_is_saved_under_its_own_name(tmp_path):
    splits = DatasetDict(train=pairs(), dev=pairs({"rejected": "SELECT 3"}))
    paths = save_llamafactory(splits, tmp_path / "p.json", name="mine")
    assert paths == {"train": tmp_path / "p_train.json", "dev": tmp_path / "p_dev.json"}
    assert json.loads(paths["dev"].read_text())[0]["rejected"] == "SELECT 3"
    registered = json.loads((tmp_path / "dataset_info.json").read_text())
    assert {name: entry["file_name"] for name, entry in registered.items()} == {
        "mine_train": "p_train.json",
        "mine_dev": "p_dev.json",
    }


def test_streams_and_other_objects_are_refused_with_the_way_out(refused):
    assert "Dataset.from_generator" in refused(pairs().to_iterable_dataset())
    assert "got list" in refused([PAIR])


@pytest.mark.parametrize("name", ["p.txt", "p", "p.json.gz", "p.csv", "p.JSON"])
def test_another_suffix_is_refused(refused, name):
    assert "must end in .json (one array) or .jsonl (one object a line)" in refused(pairs(), name)


def test_the_name_of_the_registry_and_of_a_folder_are_refused_as_path(refused, tmp_path):
    assert "is where LLaMA-Factory registers datasets" in refused(pairs(), "dataset_info.json")
    (tmp_path / "folder.json").mkdir()
    assert "is a folder" in refused(pairs(), "folder.json")


def test_a_file_where_a_folder_should_be_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(pairs(), "file/p.json")


@pytest.mark.parametrize("name", ["a,b", "a b", "", " ", "a\tb", "a\n"])
def test_a_name_that_llamafactory_would_split_is_refused(refused, name):
    assert "LLaMA-Factory splits there" in refused(pairs(), name=name)


def test_a_file_name_with_blanks_needs_a_name_of_its_own(refused, tmp_path):
    assert "pass name=" in refused(pairs(), "my pairs.json")
    save_llamafactory(pairs(), tmp_path / "my pairs.json", name="my_pairs")
    assert info(tmp_path)["my_pairs"]["file_name"] == "my pairs.json"


def test_a_destination_can_be_checked_long_before_anything_is_saved(tmp_path):
    assert check_destination(tmp_path / "new" / "p.json") == (tmp_path / "new" / "p.json", "p")
    assert check_destination(tmp_path / "p.jsonl", "mine")[1] == "mine"
    with pytest.raises(UserError, match="must end in"):
        check_destination(tmp_path / "p.txt")
    with pytest.raises(UserError, match="splits there"):
        check_destination(tmp_path / "p.json", "a,b")
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="dataset_info"):
        check_destination(tmp_path / "p.json")
    assert os.listdir(tmp_path) == ["dataset_info.json"]


# The registry


def test_other_entries_stay_as_they_are_and_in_their_order(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(OTHERS))
    save_llamafactory(pairs(), tmp_path / "m.json")
    assert list(info(tmp_path)) == ["z", "identity", "a", "m"]
    assert {name: info(tmp_path)[name] for name in OTHERS} == OTHERS


def test_an_entry_of_the_same_name_is_replaced_in_its_place_and_that_is_logged(tmp_path, caplog):
    caplog.set_level("INFO", logger="t2s_pref")
    (tmp_path / "dataset_info.json").write_text(json.dumps(OTHERS))
    save_llamafactory(pairs(), tmp_path / "p.json", name="new")
    assert "replaced" not in caplog.text
    save_llamafactory(pairs(), tmp_path / "p.json", name="identity")
    assert "replaced the entry 'identity'" in caplog.text
    assert list(info(tmp_path)) == ["z", "identity", "a", "new"]
    assert info(tmp_path)["identity"] == {"file_name": "p.json", "ranking": True, "columns": PAIR_COLUMNS}


def test_the_registry_is_ascii_whatever_the_names(tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"其他": {"file_name": "é.json"}}, ensure_ascii=False), "utf-8"
    )
    save_llamafactory(pairs(), tmp_path / "偏好.json")
    assert (tmp_path / "dataset_info.json").read_bytes().isascii()
    assert info(tmp_path)["偏好"]["file_name"] == "偏好.json"
    assert info(tmp_path)["其他"] == {"file_name": "é.json"}


def test_a_byte_order_mark_in_the_registry_is_tolerated(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(OTHERS), encoding="utf-8-sig")
    save_llamafactory(pairs(), tmp_path / "p.json")
    assert list(info(tmp_path)) == [*OTHERS, "p"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": {},}', b"[]", b'"x"', b"\xff\xfe{\x00}\x00"])
def test_a_broken_registry_is_refused_before_anything_is_written(refused, tmp_path, content):
    (tmp_path / "dataset_info.json").write_bytes(content)
    (tmp_path / "my_dpo.json").write_text("old")
    message = refused(pairs())
    assert str(tmp_path / "dataset_info.json") in message
    assert "left as it is" in message


def test_a_registry_that_is_a_link_stays_a_link(tmp_path):
    real = tmp_path / "elsewhere" / "dataset_info.json"
    real.parent.mkdir()
    real.write_text(json.dumps(OTHERS))
    (tmp_path / "dataset_info.json").symlink_to(real)
    save_llamafactory(pairs(), tmp_path / "p.json")
    assert (tmp_path / "dataset_info.json").is_symlink()
    assert list(info(real.parent)) == [*OTHERS, "p"]


def test_no_lock_file_is_left_and_one_that_is_left_over_blocks_nobody(tmp_path):
    (tmp_path / ".dataset_info.json.lock").write_text("of a killed process")
    save_llamafactory(pairs(), tmp_path / "p.json")
    assert sorted(os.listdir(tmp_path)) == ["dataset_info.json", "p.json"]


SAVE_MANY = """
import sys, time
from pathlib import Path
from datasets import Dataset
from t2s_pref.llamafactory import save_llamafactory
folder, worker, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows = Dataset.from_list([{"instruction": "a", "input": "", "output": "SELECT 1"}])
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
for n in range(count):
    save_llamafactory(rows, folder / f"w{worker}-{n}.json")
"""


def test_processes_that_save_at_the_same_time_lose_no_entry(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(OTHERS))
    workers = [start(SAVE_MANY, tmp_path, worker, 10) for worker in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert set(info(tmp_path)) == {*OTHERS, *(f"w{worker}-{n}" for worker in range(3) for n in range(10))}
    assert list(info(tmp_path))[:3] == list(OTHERS)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


HOLD = """
import sys, time
from pathlib import Path
from t2s_pref.registry import _locked
with _locked(Path(sys.argv[1]) / "dataset_info.json"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_killed_while_it_held_the_registry_blocks_nobody(tmp_path):
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError):
        FileLock(tmp_path / ".dataset_info.json.lock", timeout=0.2).acquire()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    save_llamafactory(pairs(), tmp_path / "p.json")
    assert sorted(os.listdir(tmp_path)) == ["dataset_info.json", "p.json"]


SAVE_LARGE = """
import sys
from pathlib import Path
from datasets import Dataset
from t2s_pref.llamafactory import save_llamafactory
row = {"instruction": "a" * 1000, "input": "b" * 1000, "chosen": "SELECT 1", "rejected": "SELECT 2"}
save_llamafactory(Dataset.from_dict({k: [v] * 50_000 for k, v in row.items()}), sys.argv[1])
"""


def test_a_kill_during_a_large_save_leaves_the_old_file_and_registry_intact(tmp_path):
    path = save_llamafactory(pairs(), tmp_path / "p.json")
    before = path.read_bytes(), info(tmp_path)
    saver = start(SAVE_LARGE, path)
    while saver.poll() is None and not any(part.stat().st_size > 100_000 for part in tmp_path.glob(".*.part-*")):
        time.sleep(0.01)
    saver.send_signal(signal.SIGKILL)
    saver.communicate()
    assert saver.returncode == -signal.SIGKILL
    assert (path.read_bytes(), info(tmp_path)) == before
    assert json.loads(save_llamafactory(pairs({"input": "new"}), path).read_text()) == [{**PAIR, "input": "new"}]
    assert sorted(os.listdir(tmp_path)) == ["dataset_info.json", "p.json"]  # what the killed one left is gone


def test_an_error_half_way_leaves_the_old_file_and_no_other(tmp_path):
    path = save_llamafactory(pairs(), tmp_path / "p.json")
    before = path.read_bytes(), info(tmp_path)
    with pytest.raises(UserError, match="Row 2500"):
        save_llamafactory(pairs(*({"rejected": "SELECT 2" if n < 2500 else ""} for n in range(2600))), path)
    assert (path.read_bytes(), info(tmp_path)) == before
    assert sorted(os.listdir(tmp_path)) == ["dataset_info.json", "p.json"]


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    def peak(rows: int) -> int:
        dataset = Dataset.from_dict({name: [text * 100] * rows for name, text in PAIR.items()})
        tracemalloc.start()
        try:
            save_llamafactory(dataset, tmp_path / "p.json")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8_000) < 1.5 * peak(2_000)
