"""What `load_sft` promises: the same canonical rows from every source, nothing guessed, and errors that say where."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from loopback_hub import LoopbackHub

import t2s_pref
from t2s_pref.errors import UserError
from t2s_pref.load import load_sft

ROW = {"instruction": "Answer with SQL.", "input": "How many singers?", "output": "SELECT count(*) FROM singer"}
REPOSITORY = Path(t2s_pref.__file__).parents[1]


def save(path: Path, content: Any) -> Path:
    """Write bytes and text as they are, everything else as JSON."""
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    return lambda content, name="data.json": save(tmp_path / name, content)


@pytest.fixture
def problem(file: Callable[..., Path]) -> Callable[..., str]:
    """Load what must be refused; return the message, which is always one line that names the file."""

    def load(content: Any, name: str = "data.json") -> str:
        path = file(content, name)
        with pytest.raises(UserError) as caught:
            load_sft(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    return load


def run(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**(environment or os.environ), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


# What comes out


def test_an_array_file_becomes_typed_columns(file):
    dataset = load_sft(file([ROW, {**ROW, "output": "SELECT 2"}]))
    assert dataset[1] == {**ROW, "output": "SELECT 2", "source_index": 1}
    assert dataset.features == Features(
        {
            "instruction": Value("string"),
            "input": Value("string"),
            "output": Value("string"),
            "source_index": Value("int64"),
        }
    )


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.JSONL", "data.json"])
def test_json_lines_are_read_and_blank_lines_do_not_count(file, name):
    lines = json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "output": "SELECT 2"}) + "\n"
    dataset = load_sft(file(lines, name))
    assert dataset["output"][:] == [ROW["output"], "SELECT 2"]
    assert dataset["source_index"][:] == [0, 1]


def test_a_path_may_be_a_string_or_start_at_home(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file([ROW])
    assert load_sft("~/data.json")[:] == load_sft(str(tmp_path / "data.json"))[:]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_byte_order_mark_and_windows_line_ends_pass(file, name):
    text = json.dumps([ROW, ROW], indent=1) if name == "data.json" else (json.dumps(ROW) + "\n") * 2
    dataset = load_sft(file("\ufeff" + text.replace("\n", "\r\n"), name))
    assert dataset[:] == load_sft(file([ROW, ROW], "plain.json"))[:]


def test_optional_columns_keep_their_nulls_and_their_types(file):
    history = [["How many tables?", "SELECT 1"]]
    full = {**ROW, "system": "You write SQL.", "history": history, "db_id": "concert"}
    dataset = load_sft(
        file([{**ROW, "system": None, "history": None, "db_id": None}, full, ROW, {**ROW, "history": []}])
    )
    assert dataset["history"][:] == [None, history, None, []]
    assert dataset["system"][:] == [None, "You write SQL.", None, None]
    assert dataset["db_id"][:] == [None, "concert", None, None]
    assert dataset.features["history"] == List(List(Value("string")))


def test_optional_columns_without_any_value_still_have_their_type(file):
    dataset = load_sft(file([{**ROW, "system": None, "history": []}]))
    assert dataset.features["system"] == Value("string")
    assert dataset.features["history"] == List(List(Value("string")))
    assert "db_id" not in dataset.column_names


def test_null_instruction_and_input_become_empty_strings(file):
    dataset = load_sft(file([{**ROW, "instruction": None, "input": None}, {**ROW, "input": ""}]))
    assert dataset["instruction"][:] == ["", ROW["instruction"]]
    assert dataset["input"][:] == ["", ""]


def test_other_columns_are_kept_with_one_explicit_type(file):
    other = {"id": 7, "score": 0.5, "hard": True, "tags": ["a"], "schema": {"tables": [{"name": "t", "rows": 3}]}}
    dataset = load_sft(file([{**ROW, **other}, ROW, {**ROW, "tags": [], "schema": {"tables": [None]}}]))
    assert {name: dataset[0][name] for name in other} == other
    assert dataset[1]["schema"] is None
    assert dataset.features["id"] == Value("int64")
    assert dataset.features["score"] == Value("float64")
    assert dataset.features["hard"] == Value("bool")
    assert dataset.features["tags"] == List(Value("string"))
    assert dataset.features["schema"] == {"tables": List({"name": Value("string"), "rows": Value("int64")})}


def test_strings_stay_strings_whatever_they_look_like(file):
    looks = {"day": "2020-01-01", "time": "2020-01-01T00:00:00Z", "number": "12", "quoted": '"S"', "nothing": "null"}
    dataset = load_sft(file([{**ROW, **looks, "db_id": "2020-01-01"}]))
    assert {name: dataset[0][name] for name in looks} == looks
    assert dataset[0]["db_id"] == "2020-01-01"


def test_text_outside_ascii_and_separators_inside_strings_survive(file):
    odd = {**ROW, "input": "有多少歌手？ \u2028 \x85 😀 \x00 \\ / \" '", "output": "SELECT '😀'"}
    for content, name in (([odd], "a.json"), (json.dumps(odd, ensure_ascii=False) + "\n", "b.jsonl")):
        assert load_sft(file(content, name))[0] == {**odd, "source_index": 0}


def test_integers_among_floats_become_floats_if_no_digit_is_lost(file):
    assert load_sft(file([{**ROW, "score": 1}, {**ROW, "score": 0.5}]))["score"][:] == [1.0, 0.5]


def test_source_index_counts_records_before_any_is_skipped(file, caplog):
    dataset = load_sft(
        file([{**ROW, "output": gold} for gold in ("SELECT 1", "", "SELECT 2", " \n", None, "SELECT 3")])
    )
    assert dataset["source_index"][:] == [0, 2, 5]
    assert dataset.info.description == "load_sft: 6 rows read, 3 skipped for an empty gold"
    assert "skipped 3 of 6 rows with an empty gold: records 1, 3, 4" in caplog.text


def test_nothing_is_logged_when_nothing_is_skipped(file, caplog):
    load_sft(file([ROW]))
    assert caplog.text == ""


def test_a_source_index_that_is_there_is_kept(file):
    loaded = load_sft(file([{**ROW, "output": gold} for gold in ("", "SELECT 1", "SELECT 2")]))
    assert load_sft(loaded)["source_index"][:] == [1, 2]
    assert load_sft(loaded.select([1]))["source_index"][:] == [2]
    saved = file([{**ROW, "source_index": 41}], "saved.json")
    assert load_sft(saved)["source_index"][:] == [41]


# Datasets in memory


def test_a_dataset_and_a_file_of_the_same_rows_give_the_same(file):
    rows = [{**ROW, "id": 1, "tags": ["a"]}, {**ROW, "id": 2, "tags": None}]
    from_file, from_memory = load_sft(file(rows)), load_sft(Dataset.from_list(rows))
    assert from_memory[:] == from_file[:]
    assert from_memory.features == from_file.features
    assert from_memory._fingerprint == from_file._fingerprint


def test_each_split_of_a_dataset_dict_is_loaded(caplog):
    data = DatasetDict(
        train=Dataset.from_list([ROW, {**ROW, "output": ""}]), dev=Dataset.from_list([{**ROW, "input": None}])
    )
    loaded = load_sft(data)
    assert {split: len(part) for split, part in loaded.items()} == {"train": 1, "dev": 1}
    assert loaded["dev"][0] == {**ROW, "input": "", "source_index": 0}


def test_loading_what_was_loaded_changes_nothing(file):
    once = load_sft(file([{**ROW, "history": [["a", "b"]], "id": 3}]))
    twice = load_sft(once)
    assert twice[:] == once[:]
    assert twice._fingerprint == once._fingerprint


def test_a_selected_shuffled_formatted_dataset_is_read_in_its_own_order():
    rows = Dataset.from_list([{**ROW, "output": f"SELECT {n}"} for n in range(5)])
    loaded = load_sft(rows.select([4, 0, 2]).with_format("numpy"))
    assert loaded["output"][:] == ["SELECT 4", "SELECT 0", "SELECT 2"]
    assert loaded["source_index"][:] == [0, 1, 2]


def test_a_dataset_keeps_the_features_of_its_other_columns():
    features = Features({name: Value("string") for name in ROW} | {"level": ClassLabel(names=["easy", "hard"])})
    loaded = load_sft(Dataset.from_list([{**ROW, "level": 1}], features=features))
    assert loaded.features["level"] == ClassLabel(names=["easy", "hard"])
    assert loaded["level"][:] == [1]


def test_large_strings_and_all_null_columns_of_a_dataset_become_strings():
    table = pa.table(
        {
            "instruction": pa.array(["a", "b"], pa.large_string()),
            "input": pa.nulls(2),
            "output": pa.array(["SELECT 1", "SELECT 2"]),
            "system": pa.nulls(2),
        }
    )
    loaded = load_sft(Dataset(table))
    assert all(loaded.features[name] == Value("string") for name in table.column_names)
    assert loaded["input"][:] == ["", ""]


def test_a_dataset_is_not_changed_by_being_loaded():
    rows = Dataset.from_list([ROW, {**ROW, "output": None}])
    before = rows._fingerprint, rows[:], rows.features
    load_sft(rows)
    assert (rows._fingerprint, rows[:], rows.features) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "output": 3}], r"record 0: column 'output' is an integer \('3'\); expected a string or null"),
        ([{**ROW, "input": ["a"]}], "column 'input' is a list"),
        (
            [{**ROW, "history": [["a", "b", "c"]]}],
            "column 'history' has .* expected a list of .user, assistant. string",
        ),
        ([{"instruction": "a", "output": "b"}], "column 'input' is missing; columns are"),
        ([{**ROW, "source_index": "x"}], "column 'source_index' is 'x'"),
        ([{**ROW, "source_index": None}], "column 'source_index' is 'None'"),
        ([{**ROW, "output": " "}] * 2, "every one of its 2 rows has an empty output"),
    ],
)
def test_a_dataset_with_wrong_columns_is_refused_by_name(rows, message):
    with pytest.raises(UserError, match=message):
        load_sft(Dataset.from_list(rows))


def test_a_dataset_column_of_mixed_types_is_refused(file):
    mixed = Dataset.from_json(str(file([ROW, {**ROW, "output": ["S"]}])), cache_dir=str(file("", "x").parent / "c"))
    with pytest.raises(UserError, match=r"column 'output' is Json.*mixed types"):
        load_sft(mixed)


def test_streaming_datasets_other_objects_and_empty_ones_are_refused_with_the_way_out():
    rows = Dataset.from_list([ROW])
    with pytest.raises(UserError, match=r"Dataset\.from_generator"):
        load_sft(rows.to_iterable_dataset())
    with pytest.raises(UserError, match="got list"):
        load_sft([ROW])
    with pytest.raises(UserError, match="holds no records"):
        load_sft(rows.select([]))


def test_split_and_revision_are_refused_where_they_mean_nothing(file):
    for source in (file([ROW]), Dataset.from_list([ROW])):
        with pytest.raises(UserError, match="split= and revision= choose from a Hub dataset"):
            load_sft(source, split="train")


# Fingerprints


def test_the_fingerprint_is_the_content_not_the_path_the_date_or_the_process(file):
    rows = [{**ROW, "id": n, "tags": ["é"], "score": n / 3} for n in range(2500)]
    path = file(rows)
    here = load_sft(path)._fingerprint
    os.utime(path, (0, 0))
    lines = file("".join(json.dumps(row) + "\n" for row in rows), "moved.jsonl")
    code = f"from t2s_pref.load import load_sft; print(load_sft({str(lines)!r})._fingerprint)"
    result = run(code, {**os.environ, "PYTHONHASHSEED": "1"})
    assert result.stdout.strip() == here, result.stderr


@pytest.mark.parametrize(
    "other",
    [
        [{**ROW, "id": 2}],
        [{**ROW, "id": 1.0}],
        [{**ROW, "id": "1"}],
        [{**ROW, "id": None}],
        [{**ROW, "number": 1}],
        [{**ROW, "id": 1, "input": ROW["input"] + " "}],
        [{**ROW, "id": 1}, {**ROW, "id": 1}],
        [{**ROW, "output": ""}, {**ROW, "id": 1}],
    ],
    ids=str,
)
def test_other_content_has_another_fingerprint(file, other):
    assert load_sft(file(other, "b.json"))._fingerprint != load_sft(file([{**ROW, "id": 1}]))._fingerprint


def test_the_fingerprint_does_not_depend_on_how_the_table_is_chunked():
    rows = [{**ROW, "output": f"SELECT {n}"} for n in range(2100)]
    whole = load_sft(Dataset.from_list(rows))
    pieces = pa.concat_tables([pa.Table.from_pylist(rows[n : n + 300]) for n in range(0, 2100, 300)])
    assert load_sft(Dataset(pieces))._fingerprint == whole._fingerprint


def test_a_map_over_a_reloaded_file_has_the_same_fingerprint(file):
    path = file([ROW])
    first = load_sft(path).map(str_upper)._fingerprint
    os.utime(path, (0, 0))
    assert load_sft(path).map(str_upper)._fingerprint == first


def str_upper(row: dict[str, Any]) -> dict[str, Any]:
    return {"upper": row["output"].upper()}


# Broken files: every message names the file and is one line (checked in `problem`)


def test_a_truncated_array_names_the_record_it_ends_in(problem):
    text = json.dumps([ROW, ROW, ROW], indent=1)
    message = problem(text[:-40])
    assert "record 2 (line 12): ends too early" in message
    assert "after this record the file ends; expected , or ]" in problem(text[:-2])


def test_a_truncated_line_names_the_record_and_the_line(problem):
    text = (json.dumps(ROW) + "\n\n") * 3
    assert "record 2 (line 5): ends too early" in problem(text[:-20], "data.jsonl")


def test_a_trailing_comma_is_named_after_the_last_record_and_inside_one(problem):
    assert "record 1 (line 3): trailing comma after this record" in problem(
        "[\n" + json.dumps(ROW) + ",\n" + json.dumps(ROW) + ",\n]"
    )
    assert "record 0 (line 2): trailing comma at line 4 column" in problem(
        '[\n{"instruction": "a",\n"input": "b", "output": "c",\n}]'
    )


def test_a_missing_comma_and_text_after_the_end_are_named(problem):
    one = json.dumps(ROW)
    assert "record 0 (line 1): after this record line 2 has '{" in problem(f"[{one}\n{one}]")
    assert "line 2: text after the ] that closes the array" in problem(f"[{one}\n] ]")
    assert "record 0 (line 1): text after the object" in problem(f"{one},\n{one},\n", "data.jsonl")


def test_what_is_not_json_names_line_and_column(problem):
    message = problem("[\n" + json.dumps(ROW) + ",\n {'instruction': 1}]")
    assert "record 1 (line 3): not JSON: Expecting property name" in message
    assert "line 3 column 3" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": [ROW]}, ["an object with the keys ['data']", "under 'data'", "save that list alone", "JSON array"]),
        (ROW, ["an object with the keys ['instruction', 'input', 'output']", "JSON array"]),
        (json.dumps(ROW, indent=1), ["an object with the keys", "JSON array"]),
        ('"text"', ["a string"]),
        ("instruction,input,output\n1,2,3", ["starts with 'instruction,input,ou'", "JSON array"]),
        ([], ["holds no records", "instruction, input and output"]),
        ("[]]", ["text after the ]"]),
        ("[", ["record 0 (line 1): ends too early"]),
    ],
)
def test_what_is_not_an_array_of_records_is_said_with_what_was_expected(problem, content, words):
    message = problem(content)
    assert all(word in message for word in words), message


def test_an_array_named_jsonl_is_explained(problem):
    assert "holds a JSON array, not JSON Lines; rename it to .json" in problem([ROW], "data.jsonl")


@pytest.mark.parametrize(("value", "kind"), [("x", "a string"), (None, "null"), ([], "a list"), (3, "an integer")])
def test_records_that_are_not_objects_are_named(problem, value, kind):
    assert f"record 1 (line 1): is {kind}; expected objects" in problem([ROW, value])


@pytest.mark.parametrize("name", ["instruction", "input", "output"])
def test_a_missing_column_names_record_line_and_what_is_there(problem, name):
    rows = [ROW, ROW, {key: value for key, value in ROW.items() if key != name} | {"query": 1}]
    message = problem(json.dumps(rows, indent=1))
    assert f"record 2 (line 12): column '{name}' is missing; columns are [" in message
    assert "'query'" in message
    assert "instruction, input and output" in message


@pytest.mark.parametrize("name", ["instruction", "input", "output", "system", "db_id", "dialect"])
@pytest.mark.parametrize(("value", "kind"), [(3, "an integer"), (["S"], "a list"), ({"a": 1}, "an object")])
def test_text_columns_of_another_type_are_refused(problem, name, value, kind):
    message = problem([ROW, {**ROW, name: value}])
    assert f"record 1 (line 1): column '{name}' is {kind}" in message
    assert "expected a string or null" in message


def test_accepted_golds_are_lists_of_strings_or_refused(problem, file):
    rows = load_sft(file([{**ROW, "alternatives": ["SELECT 2"]}, ROW, {**ROW, "alternatives": []}]))
    assert rows["alternatives"][:] == [["SELECT 2"], None, []]
    assert rows.features["alternatives"] == List(Value("string"))
    for other in ("SELECT 2", [1], [None], {"a": "b"}):
        message = problem([{**ROW, "alternatives": ["SELECT 2"]}, {**ROW, "alternatives": other}])
        assert "record 1 (line 1): column 'alternatives' has" in message


@pytest.mark.parametrize("history", ["text", [["a"]], [["a", None]], [["a", "b"], "c"], [["a", 1]], {"a": "b"}, 0])
def test_a_history_that_is_not_pairs_of_strings_is_refused(problem, history):
    message = problem([{**ROW, "history": [["a", "b"]]}, {**ROW, "history": history}])
    assert "record 1 (line 1): column 'history' has" in message
    assert "expected a list of [user, assistant] string pairs, or null" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, "x"], "column 'extra' mixes types: an integer in record 0 (line 1), a string in record 1"),
        ([None, True, 0], "a boolean in record 1 (line 3), an integer in record 2 (line 4)"),
        ([["a"], "a"], "a list in record 0 (line 1), a string in record 1"),
        ([["a"], [1]], "column 'extra[]' mixes types: a string in record 0 (line 1), an integer in record 1"),
        (
            [{"k": 1}, None, {"k": "x"}],
            "column 'extra.k' mixes types: an integer in record 0 (line 1), a string in reco",
        ),
        (
            [0.5, 2**53 + 1],
            "a float in record 0 (line 1), an integer in record 1 (line 3); an integer too long for a fl",
        ),
    ],
)
def test_a_column_of_mixed_types_names_two_records_and_their_types(problem, values, words):
    text = json.dumps([{**ROW, "extra": value} for value in values]).replace(', {"instruction', '\n,\n{"instruction', 1)
    text = text.replace('}, {"instruction', '},\n{"instruction')
    assert words in problem(text)


def test_integers_over_64_bits_are_refused_by_name(problem):
    assert "record 1 (line 1): column 'id' is beyond a 64-bit integer" in problem([ROW, {**ROW, "id": 2**63}])
    assert "column 'ids[]' is beyond a 64-bit integer" in problem([{**ROW, "ids": [1, -(2**63) - 1]}])
    assert "record 0 (line 1): a number has thousands of digits" in problem(
        json.dumps([{**ROW, "id": 1}]).replace('"id": 1', '"id": ' + "1" * 5000)
    )


def test_the_largest_64_bit_integers_pass(file):
    assert load_sft(file([{**ROW, "id": 2**63 - 1}, {**ROW, "id": -(2**63)}]))["id"][:] == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused_by_column(problem, number):
    text = json.dumps([ROW, {**ROW, "score": 1}]).replace('"score": 1', f'"score": {number}')
    assert "record 1 (line 1): column 'score' is not a finite number; JSON has none such, write null" in problem(text)
    in_text = json.dumps([{**ROW, "input": 1}]).replace('"input": 1', f'"input": {number}')
    assert "column 'input' is a float" in problem(in_text)


def test_a_key_that_stands_twice_in_a_record_is_refused(problem):
    twice = json.dumps([ROW, ROW]).replace('"input"', '"output"', 1)
    assert "record 0 (line 1): key 'output' appears twice" in problem(twice)
    assert "key 'a' appears twice" in problem(json.dumps([{**ROW, "x": {"a": 1, "b": 2}}]).replace('"b"', '"a"'))


@pytest.mark.parametrize("column", ["output", "extra"])
def test_half_a_surrogate_pair_is_refused_by_record(problem, column):
    message = problem([ROW, {**ROW, column: "SELECT '\ud800'"}])
    assert f"record 1 (line 1): column '{column}' holds '\\ud800', half of a surrogate pair" in message


def test_half_a_surrogate_pair_in_a_key_or_a_nested_value_is_refused(problem):
    assert "half of a surrogate pair" in problem([{**ROW, "\ud800": 1}])
    assert "half of a surrogate pair" in problem([{**ROW, "x": {"\udfff": 1}}])
    assert "column 'x' holds '\\udfff'" in problem([{**ROW, "x": [{"k": "\udfff"}]}])


def test_text_that_is_not_utf8_names_the_byte_and_the_way_out(problem):
    data = json.dumps([ROW, {**ROW, "input": "¿cuántos?"}], indent=1, ensure_ascii=False).encode("latin-1")
    message = problem(data)
    assert f"byte 0xbf at offset {data.index(0xBF)} (line 9) is not UTF-8" in message
    assert "re-encode the file as UTF-8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf16_and_utf32_are_named(problem, encoding):
    message = problem(json.dumps([ROW]).encode(encoding))
    assert encoding.upper()[:6] in message
    assert "re-encode it as UTF-8" in message


def test_compressed_and_parquet_files_are_named(problem, tmp_path):
    import gzip

    assert "compressed with gzip; unpack it first" in problem(gzip.compress(b"[]"))
    Dataset.from_list([ROW]).to_parquet(tmp_path / "rows.parquet")
    assert "Dataset.from_parquet" in problem((tmp_path / "rows.parquet").read_bytes())


@pytest.mark.parametrize("content", [b"", b" \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_an_empty_file_is_named(problem, content, name):
    assert "is empty; expected objects with the text columns" in problem(content, name)


def test_a_file_whose_every_gold_is_empty_is_refused(problem):
    assert "every one of its 3 rows has an empty output" in problem(
        [{**ROW, "output": gold} for gold in ("", None, " ")]
    )


def test_values_nested_thousands_deep_are_refused(problem):
    deep = "[" * 100_000 + "]" * 100_000
    assert "record 0 (line 1): lists or objects are nested too deeply" in problem(
        json.dumps([{**ROW, "x": 0}]).replace('"x": 0', f'"x": {deep}')
    )


def test_values_used_as_keys_are_refused_before_they_become_columns(problem):
    assert "the records have 2003 different keys" in problem([{**ROW, f"id-{n}": 1} for n in range(2000)])
    assert "the objects in column 'x' have 2000 different keys" in problem(
        [{**ROW, "x": {str(n): 1}} for n in range(2000)]
    )


@pytest.mark.parametrize(
    "name",
    ["missing.json", "folder/missing.jsonl", "x.ndjson", "./user/name", "/user/name", "~/name", "a/b/c", "a b", "a\\b"],
)
def test_a_missing_path_is_not_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file .*; a Hub dataset is written user/name"):
        load_sft(name)


def test_a_missing_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_sft(Path("user/name"))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the JSON or JSON Lines file in it"):
        load_sft(tmp_path)


# Size


def test_a_hundred_thousand_rows_load_in_seconds(file):
    rows = [{**ROW, "input": f"Schema and question {n} " * 10, "id": n} for n in range(100_000)]
    path = file(rows)
    start = time.perf_counter()
    assert len(load_sft(path)) == 100_000
    assert time.perf_counter() - start < 15  # 1.5 s where this was written; the rest is for a busy machine


# The Hub, in processes of their own: its address is read when the clients are imported


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    def lines(*golds: str) -> str:
        return "".join(json.dumps({**ROW, "output": gold}) + "\n" for gold in golds)

    with LoopbackHub() as hub:
        hub.add("dataset", "user/data", {"train.jsonl": lines("SELECT 0")}, "old")
        hub.add(
            "dataset", "user/data", {"train.jsonl": lines("SELECT 1", "", "SELECT 3"), "test.jsonl": lines("SELECT 4")}
        )
        hub.add("dataset", "user/broken", {"train.jsonl": lines("SELECT 1", "SELECT 2")[:-20]})
        hub.add("dataset", "user/nothing", {"README.md": "no data"})
        hub.add("dataset", "user/columns", {"train.jsonl": '{"question": "a", "sql": "b"}\n'})
        yield hub


HUB_SCRIPT = """
import json, sys
from t2s_pref.errors import UserError
from t2s_pref.load import load_sft
for arguments in json.loads(sys.stdin.read()):
    try:
        found = load_sft(arguments.pop("source"), **arguments)
        parts = found if isinstance(found, dict) else {"": found}
        print(json.dumps({k: [p["output"][:], p["source_index"][:], p._fingerprint] for k, p in parts.items()}))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub_load(hub: LoopbackHub, tmp_path: Path) -> Callable[..., list[Any]]:
    def load(*calls: dict[str, Any]) -> list[Any]:
        environment = {**hub.environment(tmp_path), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", HUB_SCRIPT]
        result = subprocess.run(
            command, env=environment, input=json.dumps(calls), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return load


def test_a_hub_dataset_is_loaded_whole_by_split_and_by_revision(hub_load, file):
    whole, train, cut, old = hub_load(
        {"source": "user/data"},
        {"source": "user/data", "split": "train"},
        {"source": "user/data", "split": "train[1:]"},
        {"source": "user/data", "revision": "old"},
    )
    same = load_sft(file([{**ROW, "output": gold} for gold in ("SELECT 1", "", "SELECT 3")]))
    assert whole["train"] == [["SELECT 1", "SELECT 3"], [0, 2], same._fingerprint]
    assert whole["test"][:2] == [["SELECT 4"], [0]]
    assert train[""] == whole["train"]
    assert cut[""][:2] == [["SELECT 3"], [1]]
    assert list(old) == ["train"]
    assert old["train"][0] == ["SELECT 0"]


def test_what_is_wrong_with_a_hub_dataset_is_one_line(hub_load):
    absent, revision, split, broken, nothing, columns = hub_load(
        {"source": "user/absent"},
        {"source": "user/data", "revision": "nowhere"},
        {"source": "user/data", "split": "dev"},
        {"source": "user/broken"},
        {"source": "user/nothing"},
        {"source": "user/columns"},
    )
    assert (
        "user/absent: neither a file here nor loaded as a dataset from the Hub: Dataset 'user/absent' doesn't" in absent
    )
    assert "Revision 'nowhere' doesn't exist" in revision
    assert "Unknown split \"dev\". Should be one of ['train', 'test']" in split
    assert "JSON parse error" in broken
    assert "doesn't contain any data files" in nothing
    assert "user/columns (split train): column 'instruction' is missing; columns are ['question', 'sql']" in columns
    assert not any("\n" in message for message in (absent, revision, split, broken, nothing, columns))


def test_a_hub_that_stumbles_is_asked_again_and_one_that_is_down_is_one_line(hub, hub_load):
    hub.fail(503, times=1, match="resolve/.*/train.jsonl")
    hub.drop(after=20, times=1, match="resolve/.*/test.jsonl")
    try:
        (whole,) = hub_load({"source": "user/data"})
        hub.drop(match="user/columns")
        (down,) = hub_load({"source": "user/columns"})
    finally:
        hub.heal()
    assert {split: part[0] for split, part in whole.items()} == {
        "train": ["SELECT 1", "SELECT 3"],
        "test": ["SELECT 4"],
    }
    assert "user/columns: neither a file here nor loaded as a dataset from the Hub" in down
    assert "\n" not in down
