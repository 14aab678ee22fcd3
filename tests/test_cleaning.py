"""What users of verify and clean_preferences can rely on: what is kept is proven wrong and as it was in the file."""

import json
import sqlite3
from contextlib import closing
from datetime import datetime

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from t2s_pref import UserError
from t2s_pref.cleaning import clean_preferences
from t2s_pref.verdicts import WRONG

GOLD = "SELECT name FROM singer WHERE age > 29"
# each reject, and its verdict against GOLD
REJECTS = {
    "SELECT name FROM singer": "wrong_result",
    "SELECT name FROM singers": "missing_table",
    "SELECT name FROM singer WHERE NOT age <= 29": "equivalent",
    "select name from singer where age>29;": "same_ast",
    "SELECT DISTINCT upper(name) FROM singer WHERE age > 29": "ambiguous",
    "DROP TABLE singer": "blocked",
}


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cleaning")
    for name in ("music", "opera"):
        (folder / name).mkdir()
        with closing(sqlite3.connect(folder / name / f"{name}.sqlite")) as connection:
            connection.execute("CREATE TABLE singer (name TEXT, age INTEGER)")
            connection.execute("INSERT INTO singer VALUES ('Ana', 30), ('Bo', 40), ('Cy', 20)")
            connection.commit()
    return folder


def alpaca(reject):
    return {"instruction": "Write SQL.", "input": "Who?", "chosen": GOLD, "rejected": reject}


def sharegpt(reject):
    prompt = [{"from": "human", "value": "Who?"}]
    sides = {side: {"from": "gpt", "value": text} for side, text in (("chosen", GOLD), ("rejected", reject))}
    return {"conversations": prompt, **sides}


def conversational(reject):
    """TRL's, with the prompt in a column of its own."""
    sides = {
        side: [{"role": "assistant", "content": f"```sql\n{text}\n```"}]
        for side, text in (("chosen", GOLD), ("rejected", reject))
    }
    return {"prompt": [{"role": "user", "content": "Who?"}], **sides}


def implicit(reject):
    """TRL's, with the prompt in both sides."""
    start = [{"role": "user", "content": "Who?"}]
    sides = {"chosen": GOLD, "rejected": reject}
    return {side: [*start, {"role": "assistant", "content": text}] for side, text in sides.items()}


def standard(reject):
    return {"prompt": "Who?", "chosen": f" {GOLD}", "rejected": f" {reject}"}


def listed(reject):
    """LLaMA-Factory's of 2023: both sides in one list."""
    return {"instruction": "Write SQL.", "input": "Who?", "output": [GOLD, reject]}


LAYOUTS = [alpaca, sharegpt, conversational, implicit, standard, listed]


@pytest.fixture
def clean(tmp_path, databases, cache_dir):
    """Write records, clean them; return the report and the records that were kept."""

    def run(records, suffix=".json", **more):
        source = tmp_path / f"pairs{suffix}"
        if suffix == ".jsonl":
            source.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        else:
            source.write_text(json.dumps(records), encoding="utf-8")
        before = source.read_bytes()
        output = tmp_path / f"clean{suffix}"
        where = more.pop("databases", databases / "music" / "music.sqlite")
        found = clean_preferences(source, where, output, cache_dir=cache_dir, **more)
        assert source.read_bytes() == before
        if not output.exists():
            return found, None
        text = output.read_text(encoding="utf-8")
        return found, [json.loads(line) for line in text.splitlines()] if suffix == ".jsonl" else json.loads(text)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_only_pairs_proven_wrong_are_kept_whatever_tool_the_file_is_from(clean, layout, suffix):
    found, kept = clean([layout(reject) for reject in REJECTS], suffix)
    assert kept == [layout(reject) for reject, verdict in REJECTS.items() if verdict in WRONG]
    assert (found.pairs, found.kept, found.poisoned) == (6, 2, 2)
    assert found.verdicts == {verdict: list(REJECTS.values()).count(verdict) for verdict in found.verdicts}


def test_every_pair_that_was_dropped_is_reported_with_why(clean):
    found, _ = clean([alpaca(reject) for reject in REJECTS])
    assert {each["rejected"]: each["verdict"] for each in found.dropped} == {
        reject: verdict for reject, verdict in REJECTS.items() if verdict not in WRONG
    }
    assert [each["record"] for each in found.dropped] == [2, 3, 4, 5]
    assert all(each["chosen"] == GOLD and each["gold_verdict"] == "ok" for each in found.dropped)
    assert json.loads(json.dumps(found.to_dict()))["poisoned"] == 2
    assert "poisoned: the rejected SQL is right" in str(found)


def test_a_record_keeps_all_its_fields_and_their_order(clean):
    record = {"id": 7, **alpaca("SELECT 1"), "meta": {"é": [1, None, 2.5]}, "system": "", "none": None}
    _, kept = clean([record])
    assert json.dumps(kept) == json.dumps([record])


def test_keep_decides_otherwise_where_asked(clean):
    found, kept = clean([alpaca(reject) for reject in REJECTS], keep=["ambiguous", "wrong_result"])
    assert [REJECTS[each["rejected"]] for each in kept] == ["wrong_result", "ambiguous"]
    assert found.kept == 2


def test_rows_name_their_database_and_one_that_is_missing_drops_only_its_own(clean, databases):
    records = [{**alpaca("SELECT 1"), "db_id": name} for name in ("music", "nowhere", "opera")]
    found, kept = clean(records, databases=databases)
    assert [each["db_id"] for each in kept] == ["music", "opera"]
    assert found.golds == {"ok": 2, "no_database": 1}


def test_a_chosen_side_that_fails_condemns_nothing(clean):
    found, kept = clean([{**alpaca("SELECT 1"), "chosen": "SELECT nme FROM singer"}, alpaca("SELECT 1")])
    assert len(kept) == 1
    assert found.golds == {"ok": 1, "gold_error": 1}
    assert found.dropped[0]["gold_detail"] == "no such column: nme"


def test_another_accepted_gold_saves_a_pair_from_being_kept(clean):
    right = "SELECT name FROM singer WHERE age < 30"
    found, kept = clean([{**alpaca(right), "alternatives": [right]}, alpaca(right)])
    assert kept == [alpaca(right)]
    assert found.poisoned == 1


def test_the_same_pair_twice_is_kept_twice(clean):
    _, kept = clean([alpaca("SELECT 1")] * 2)
    assert len(kept) == 2


def test_alpaca_pairs_can_be_trained_on_at_once(clean, tmp_path):
    clean([alpaca("SELECT 1")], dataset_name="cleaned")
    entry = json.loads((tmp_path / "dataset_info.json").read_text())["cleaned"]
    assert (entry["file_name"], entry["ranking"]) == ("clean.json", True)
    assert entry["columns"] == {
        "prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"
    }  # fmt: skip


@pytest.mark.parametrize("layout", [sharegpt, conversational, listed])
def test_other_layouts_get_no_entry_that_would_not_fit_them(clean, tmp_path, layout):
    clean([layout("SELECT 1")])
    assert not (tmp_path / "dataset_info.json").exists()


def test_what_is_written_loads_as_a_dataset(clean, tmp_path):
    clean([conversational(reject) for reject in REJECTS])
    rows = load_dataset("json", data_files=str(tmp_path / "clean.json"), split="train", cache_dir=str(tmp_path / "hf"))
    assert rows.column_names == ["prompt", "chosen", "rejected"]
    assert len(rows) == 2


def test_where_nothing_is_left_no_file_is_written(clean, tmp_path):
    found, kept = clean([alpaca(GOLD)])
    assert kept is None
    assert (found.kept, found.poisoned) == (0, 1)
    assert not (tmp_path / "dataset_info.json").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "x"}, "record 1 (line 1): column 'chosen' is missing"),
        ({**alpaca("SELECT 1"), "rejected": None}, "'rejected' is 'None'"),
        ({**alpaca("SELECT 1"), "rejected": []}, "'rejected' is '[]'"),
        ({**alpaca("SELECT 1"), "rejected": ["SELECT 1", "SELECT 2"]}, "'rejected' is \"['SELECT 1', 'SELECT 2']\""),
        ({**alpaca("SELECT 1"), "rejected": {"text": "SELECT 1"}}, "with 'content' or 'value'"),
        ({"output": [GOLD]}, "'chosen' is missing"),
        ({**alpaca("SELECT 1"), "db_id": 7}, "'db_id' is '7'"),
        ({**alpaca("SELECT 1"), "dialect": ["x"]}, "'dialect' is"),
        ({**alpaca("SELECT 1"), "dialect": "klingon"}, "klingon"),
        ({**alpaca("SELECT 1"), "alternatives": "SELECT 1"}, "'alternatives' is 'SELECT 1'"),
        ({**alpaca("SELECT 1"), "rejected": "SELECT '\ud800'"}, "record 1"),
        ("SELECT 1", "is a string; expected objects with the gold SQL as chosen and other SQL as rejected"),
    ],
)
def test_a_record_that_cannot_be_judged_is_named(clean, tmp_path, record, message):
    with pytest.raises(UserError) as refused:
        clean([alpaca("SELECT 1"), record])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "clean.json").exists()


def test_a_dataset_in_memory_is_cleaned_whatever_its_other_columns_hold(databases, tmp_path, cache_dir):
    pairs = Dataset.from_list([{**alpaca("SELECT 1"), "db_id": "music", "created": datetime(2024, 1, 2)}])
    for data in (pairs, DatasetDict(train=pairs)):
        assert clean_preferences(data, databases, tmp_path / "clean.json", cache_dir=cache_dir).kept == 1
    assert json.loads((tmp_path / "clean.json").read_text())[0]["created"] == "2024-01-02 00:00:00"


def test_one_verdict_to_keep_may_be_given_as_a_string(clean):
    _, kept = clean([alpaca(GOLD), alpaca("SELECT nope")], keep="missing_column")
    assert kept == [alpaca("SELECT nope")]


def test_wrong_arguments_are_refused_before_anything_runs(clean, databases, tmp_path):
    with pytest.raises(UserError, match="keep has 'wrong', which is no verdict"):
        clean([alpaca("SELECT 1")], keep=["wrong"])
    source = tmp_path / "pairs.json"
    with pytest.raises(UserError, match="would be overwritten"):
        clean_preferences(source, databases, tmp_path / "." / "pairs.json")
    with pytest.raises(UserError, match="csv"):
        clean_preferences(source, databases, tmp_path / "clean.csv")
    with pytest.raises(UserError, match=r"absent.json"):
        clean_preferences(tmp_path / "absent.json", databases, tmp_path / "clean.json")
