"""What `explode_rejected` promises: one pair a usable reject, nothing lost, nothing changed, found again."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import t2s_pref
from t2s_pref import UserError, explode_rejected
from t2s_pref.pairs import drop_causes, mark_drops
from t2s_pref.sql import normalize_sql

GOLD = "SELECT name FROM singer WHERE age > 20"
WRONG = "SELECT age FROM singer"
REPOSITORY = Path(t2s_pref.__file__).parents[1]


def table(*rejected, gold=GOLD, **columns):
    """Rows with these lists of rejects, and further columns."""
    features = Features({"output": Value("string"), "rejected": List(Value("string"))})
    rows = Dataset.from_dict({"output": [gold] * len(rejected), "rejected": list(rejected)}, features=features)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def exploded(rows, cache_dir, dedup="none", **more):
    return explode_rejected(rows, dedup, cache_dir=cache_dir, **more)


@pytest.fixture
def refusal(cache_dir):
    """Explode what must be refused; return the message, which is always one line."""

    def refuse(rows, *arguments, **more):
        with pytest.raises(UserError) as refused:
            explode_rejected(rows, *arguments, cache_dir=cache_dir, **more)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return refuse


# -- the pairs -------------------------------------------------------------------------------------------------------


def test_every_reject_becomes_a_row_with_the_columns_of_its_source_row(cache_dir):
    rows = table(["SELECT 1", "SELECT 2"], [], ["SELECT 3"], db_id=["a", "b", "c"], score=[0.5, 1.5, 2.5])
    pairs = exploded(rows, cache_dir)
    assert pairs[:] == {
        "output": [GOLD] * 3,
        "rejected": ["SELECT 1", "SELECT 2", "SELECT 3"],
        "db_id": ["a", "a", "c"],
        "score": [0.5, 0.5, 2.5],
        "chosen": [GOLD] * 3,
        "rejected_index": [0, 1, 0],
    }
    assert pairs.features == Features(
        {
            "output": Value("string"),
            "rejected": Value("string"),
            "db_id": Value("string"),
            "score": Value("float64"),
            "chosen": Value("string"),
            "rejected_index": Value("int64"),
        }
    )


def test_columns_of_any_type_are_kept_as_they_are(cache_dir):
    rows = table(["SELECT 1"], ["SELECT 2"], history=[[["hi", "there"]], []], meta=[{"a": 1}, {"a": None}])
    pairs = exploded(rows, cache_dir)
    assert {name: pairs.features[name] for name in ("history", "meta")} == {
        name: rows.features[name] for name in ("history", "meta")
    }
    assert pairs["history"][:] == rows["history"][:]
    assert pairs["meta"][:] == rows["meta"][:]


def test_the_index_of_a_reject_is_its_place_in_the_list_even_where_others_were_dropped(cache_dir):
    pairs = exploded(table(["", GOLD, "SELECT 1", "", "SELECT 2"]), cache_dir)
    assert pairs["rejected_index"][:] == [2, 4]


def test_a_reject_is_kept_as_the_model_wrote_it(cache_dir):
    odd = "  select\n\tAGE -- why\nfrom singer ; "
    assert exploded(table([odd]), cache_dir, "normalized")["rejected"][:] == [odd]


def test_what_sampling_noted_of_a_candidate_is_left_out_of_the_pairs(cache_dir):
    noted = table(
        ["SELECT 1"],
        candidate_status=[["truncated", "sampled"]],
        generated_tokens=[[64, 9]],
        generation_seconds=[0.25],
    )
    assert exploded(noted, cache_dir).column_names == ["output", "rejected", "chosen", "rejected_index"]


def test_a_raw_answer_goes_with_the_reject_that_was_taken_out_of_it(cache_dir):
    noted = table(
        ["SELECT 1", "SELECT 2"],
        [GOLD, "SELECT 4"],
        candidate_status=[["truncated", "sampled", "no_sql", "sampled"], ["sampled", "prompt_too_long", "sampled"]],
        raw_answers=[["SELECT 1, 1, 1,", "so: SELECT 1", "no idea", "so: SELECT 2"], [GOLD, "", "so: SELECT 4"]],
    )
    pairs = exploded(noted, cache_dir)
    assert pairs["rejected"][:] == ["SELECT 1", "SELECT 2", "SELECT 4"]
    assert pairs["raw_answer"][:] == ["so: SELECT 1", "so: SELECT 2", "so: SELECT 4"]
    assert pairs.features["raw_answer"] == Value("string")
    assert "raw_answers" not in pairs.column_names


def test_raw_answers_without_statuses_are_taken_to_be_one_a_reject(cache_dir):
    pairs = exploded(table(["SELECT 1", GOLD, "SELECT 2"], raw_answers=[["a", "b", "c"]]), cache_dir)
    assert pairs["raw_answer"][:] == ["a", "c"]


@pytest.mark.parametrize("statuses", [None, [["sampled", "sampled"]], [["no_sql", "truncated"]]])
def test_raw_answers_that_do_not_match_the_rejects_are_refused(refusal, statuses):
    noted = table(["SELECT 1"], raw_answers=[["a", "b"]])
    noted = noted if statuses is None else noted.add_column("candidate_status", statuses)
    assert "raw_answers" in refusal(noted)


# -- what is never kept ----------------------------------------------------------------------------------------------

SAME_AS_GOLD = [
    GOLD,
    f"  {GOLD};\n",
    GOLD.lower(),
    GOLD.replace(" ", "\n  "),
    f"-- a comment\n{GOLD} /* another */",
    f"```sql\n{GOLD}\n```",
]


@pytest.mark.parametrize("dedup", ["none", "exact", "normalized"])
@pytest.mark.parametrize("same", SAME_AS_GOLD)
def test_a_reject_that_is_the_gold_in_other_words_is_never_kept(cache_dir, dedup, same):
    assert exploded(table([same, WRONG]), cache_dir, dedup)["rejected"][:] == [WRONG]


@pytest.mark.parametrize("dedup", ["none", "exact", "normalized"])
@pytest.mark.parametrize("empty", ["", " ", ";", " ;;\n", None])
def test_an_empty_reject_is_never_kept(cache_dir, dedup, empty):
    assert exploded(table([empty, WRONG]), cache_dir, dedup)["rejected"][:] == [WRONG]


def test_dedup_none_keeps_repeated_rejects(cache_dir):
    assert len(exploded(table([WRONG, WRONG, f" {WRONG}"]), cache_dir)) == 3


def test_dedup_exact_keeps_the_first_of_equal_texts_outer_white_space_aside(cache_dir):
    pairs = exploded(table([WRONG, f"\n{WRONG} ", WRONG.lower(), WRONG]), cache_dir, "exact")
    assert pairs["rejected_index"][:] == [0, 2]


def test_dedup_normalized_keeps_the_first_of_equal_queries(cache_dir):
    pairs = exploded(table([WRONG.lower(), WRONG, f"{WRONG};", "SELECT age, age FROM singer"]), cache_dir, "normalized")
    assert pairs["rejected_index"][:] == [0, 3]


def test_rejects_of_different_rows_are_never_duplicates_of_each_other(cache_dir):
    assert len(exploded(table([WRONG], [WRONG]), cache_dir, "normalized")) == 2


def test_a_row_is_compared_in_its_own_dialect_and_without_one_in_the_given(cache_dir):
    # MySQL's names may be case-sensitive, so there these are two queries
    rows = table(*[["SELECT Age FROM Singer", "SELECT age FROM singer"]] * 3, dialect=["sqlite", "mysql", None])
    pairs = exploded(rows, cache_dir, "normalized")
    assert pairs["dialect"][:] == ["sqlite", "mysql", "mysql", None]
    pairs = exploded(rows, cache_dir, "normalized", dialect="mysql")
    assert pairs["dialect"][:] == ["sqlite", "mysql", "mysql", None, None]


PIECES = st.sampled_from([*"aA1;'\" \n", "SELECT ", "select\t", "--x\n", "/**/", ",", "(", ")", "```", "\\", "é", "="])
TEXTS = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.none())


@given(TEXTS, st.lists(TEXTS, max_size=6), st.sampled_from(["none", "exact", "normalized"]))
@settings(max_examples=300, deadline=None)
def test_whatever_the_texts_no_kept_reject_is_empty_or_equal_to_the_gold_or_to_a_kept_one(gold, rejects, dedup):
    causes = drop_causes(gold or "", rejects, dedup, "sqlite")
    assert len(causes) == len(rejects)
    kept = [reject for reject, cause in zip(rejects, causes, strict=True) if not cause]
    same = {"none": id, "exact": str.strip, "normalized": normalize_sql}[dedup]
    assert all(reject.strip(" ;\n\t") for reject in kept)
    assert all(normalize_sql(reject) != normalize_sql(gold or "") for reject in kept)
    assert all(reject.strip() != (gold or "").strip() for reject in kept)
    assert dedup == "none" or len({same(reject.strip()) for reject in kept}) == len(kept)
    for reject, cause in zip(rejects, causes, strict=True):  # and nothing is dropped without need
        if cause == "duplicate":
            assert same(reject.strip()) in {same(other.strip()) for other in kept}


@given(st.lists(st.lists(TEXTS, max_size=4), max_size=5), st.sampled_from(["none", "exact", "normalized"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_rejects_the_pairs_are_the_kept_ones_in_order(tmp_path, rejected, dedup):
    gold = "SELECT a"
    rows = table(*rejected, gold=gold, number=list(range(len(rejected))))
    wanted = [
        (number, place, reject)
        for number, rejects in enumerate(rejected)
        for place, reject in enumerate(rejects)
        if not drop_causes(gold, rejects, dedup, "sqlite")[place]
    ]
    pairs = exploded(rows, tmp_path, dedup)
    assert list(zip(*(pairs[name][:] for name in ("number", "rejected_index", "rejected")), strict=True)) == wanted


# -- datasets of every kind ------------------------------------------------------------------------------------------


def test_each_split_of_a_dict_is_exploded(cache_dir):
    both = exploded(DatasetDict(train=table(["SELECT 1", "SELECT 2"]), test=table(["SELECT 3"])), cache_dir)
    assert isinstance(both, DatasetDict)
    assert {name: part["rejected"][:] for name, part in both.items()} == {
        "train": ["SELECT 1", "SELECT 2"],
        "test": ["SELECT 3"],
    }


def test_the_dataset_given_is_not_changed(cache_dir):
    rows = table(["SELECT 1", GOLD], raw_answers=[["a", "b"]])
    before = rows[:], rows.features.copy(), rows._fingerprint, rows.info.description
    exploded(rows, cache_dir, "normalized")
    assert (rows[:], rows.features, rows._fingerprint, rows.info.description) == before


def test_pairs_chain_with_further_transforms_before_and_after(cache_dir):
    rows = table(*[["SELECT 1", "SELECT 2"]] * 10, number=list(range(10)))
    rows = rows.shuffle(seed=3).filter(lambda row: row["number"] % 2 == 0).select(range(4))
    rows = rows.map(lambda row: {"twice": 2 * row["number"]})
    pairs = exploded(rows, cache_dir)
    assert pairs["number"][:] == [number for number in rows["number"] for _ in range(2)]
    split = pairs.filter(lambda row: row["rejected_index"] == 0).train_test_split(test_size=0.25, seed=1)
    assert (len(split["train"]), len(split["test"])) == (3, 1)
    again = split.map(lambda row: {"both": row["chosen"] + row["rejected"]}).sort("number").rename_column("both", "b")
    assert again["test"][0]["b"] == f"{GOLD}SELECT 1"


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_dataset_in_another_format_gives_the_same_pairs(cache_dir, kind):
    rows = table(["SELECT 1", GOLD, "SELECT 2"], [], ["SELECT 3"], number=[1, 2, 3])
    assert exploded(rows.with_format(kind), cache_dir)[:] == exploded(rows, cache_dir)[:]


def test_the_large_types_of_polars_and_arrow_are_taken_too(cache_dir):
    strings = pa.array([["SELECT 1", "SELECT 2"]], pa.large_list(pa.large_string()))
    rows = Dataset(pa.table({"output": pa.array([GOLD], pa.large_string()), "rejected": strings}))
    pairs = exploded(rows, cache_dir)
    assert pairs["rejected"][:] == ["SELECT 1", "SELECT 2"]
    assert pairs.features["rejected"] == Value("string")


@pytest.mark.parametrize("rejected", [[GOLD], [""], []])
def test_where_nothing_is_kept_there_are_no_rows_but_the_right_columns(cache_dir, rejected):
    full = exploded(table([WRONG], number=[1]), cache_dir)
    for _ in range(2):  # built, then found
        none = exploded(table(rejected, number=[1]), cache_dir)
        assert len(none) == 0
        assert none.features == full.features


def test_lists_that_are_all_empty_or_null_are_no_rejects(cache_dir):
    for nothing in ([[], []], [None, None]):
        assert len(exploded(Dataset.from_dict({"output": [GOLD] * 2, "rejected": nothing}), cache_dir)) == 0


def test_a_dataset_without_rows_gives_pairs_without_rows_but_with_the_right_columns(cache_dir):
    full = exploded(table([WRONG], raw_answers=[["a"]], generated_tokens=[[3]]), cache_dir)
    empty = table([WRONG], raw_answers=[["a"]], generated_tokens=[[3]]).select([])
    for rows in (empty, Dataset.from_dict({name: [] for name in empty.column_names}, features=empty.features)):
        pairs = exploded(rows, cache_dir)
        assert len(pairs) == 0
        assert pairs.features == full.features
        assert pairs is not rows


# -- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_dedup_is_refused_with_the_known_ones(refusal):
    assert refusal(table([WRONG]), "fuzzy") == "dedup is 'fuzzy'; it must be one of none, exact, normalized."


def test_an_unknown_dialect_is_refused_with_the_known_ones_wherever_it_stands(refusal):
    for message in (
        refusal(table([WRONG]), "none", "sqlight"),
        refusal(table([WRONG], [WRONG], dialect=["sqlite", "sqlight"])),
    ):
        assert "'sqlight'" in message
        assert "postgres, " in message


def test_a_missing_column_is_refused_with_the_columns_there_are(refusal):
    message = refusal(table([WRONG]).remove_columns("rejected"))
    assert "'rejected' not found; columns are ['output']" in message
    assert "generate_rejected" in message
    assert "'output' not found" in refusal(table([WRONG]).remove_columns("output"))


def test_pairs_are_not_exploded_a_second_time(cache_dir, refusal):
    pairs = exploded(table([WRONG]), cache_dir)
    assert "these are pairs already" in refusal(pairs)
    large = pairs.cast_column("rejected", Value("large_string"))
    assert "these are pairs already" in refusal(large)


def test_a_streamed_dataset_is_refused_with_the_way_out(refusal):
    streamed = table([WRONG]).to_iterable_dataset()
    assert "materialise it first: Dataset.from_generator" in refusal(streamed)
    assert "IterableDatasetDict" in refusal(IterableDatasetDict(train=streamed))


def test_what_is_no_dataset_is_refused(refusal):
    assert "Expected a Dataset or a DatasetDict, got list" in refusal([{"output": GOLD, "rejected": [WRONG]}])


def test_num_proc_and_unknown_arguments_are_refused_with_the_way_out(refusal):
    assert "accelerate launch --num_processes" in refusal(table([WRONG]), num_proc=2)
    for name, value in (("batch_size", 4), ("batched", False), ("fn_kwargs", {}), ("new_fingerprint", "a")):
        assert f"{name!r} is not known here" in refusal(table([WRONG]), **{name: value})


# -- caching ---------------------------------------------------------------------------------------------------------


def files(cache_dir):
    return {path: path.stat().st_ino for path in cache_dir.glob("*/*.arrow")}


def test_a_second_call_finds_the_first_ones_result_for_a_dataset_in_memory_too(cache_dir):
    rows = table([WRONG, GOLD])
    assert not rows.cache_files
    first = exploded(rows, cache_dir, "normalized")
    built = files(cache_dir)
    second = exploded(rows, cache_dir, "normalized")
    assert files(cache_dir) == built
    assert len(built) == 2
    assert first._fingerprint == second._fingerprint
    assert first[:] == second[:]


def test_equal_rows_made_anew_find_the_result_and_other_rows_or_settings_do_not(cache_dir):
    first = exploded(table([WRONG]), cache_dir)
    assert exploded(table([WRONG]), cache_dir)._fingerprint == first._fingerprint
    others = [
        exploded(table([WRONG]), cache_dir, "exact"),
        exploded(table([WRONG]), cache_dir, dialect="mysql"),
        exploded(table([f"{WRONG} "]), cache_dir),
    ]
    assert len({first._fingerprint, *(other._fingerprint for other in others)}) == 4


IN_ANOTHER_PROCESS = """
import json, sys
from datasets import Dataset
from t2s_pref import explode_rejected
rows = Dataset.from_dict(json.loads(sys.argv[1]))
pairs = explode_rejected(rows, "normalized", cache_dir=sys.argv[2])
print(json.dumps([pairs._fingerprint, pairs[:], "torch" in sys.modules]))
"""


def test_another_process_finds_the_result_of_rows_that_it_made_itself(cache_dir):
    columns = {"output": [GOLD], "rejected": [[WRONG, GOLD]]}
    here = exploded(Dataset.from_dict(columns), cache_dir, "normalized")
    built = files(cache_dir)
    there = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, json.dumps(columns), str(cache_dir)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert json.loads(there.stdout) == [here._fingerprint, here[:], False]
    assert files(cache_dir) == built


def test_caching_can_be_switched_off_for_a_call_and_for_a_process(cache_dir):
    rows = table([WRONG])
    first = exploded(rows, cache_dir)
    built = files(cache_dir)
    assert exploded(rows, cache_dir, load_from_cache_file=False)[:] == first[:]
    rebuilt = files(cache_dir)
    assert set(rebuilt) == set(built)
    assert all(rebuilt[path] != built[path] for path in built)
    datasets.disable_caching()
    try:
        assert exploded(rows, cache_dir)[:] == first[:]
        assert all(files(cache_dir)[path] != rebuilt[path] for path in built)
        off = files(cache_dir)
        exploded(rows, cache_dir, load_from_cache_file=True)
        assert files(cache_dir) == off
    finally:
        datasets.enable_caching()


def test_how_rows_are_written_does_not_change_the_key(cache_dir):
    rows = table([WRONG], ["SELECT 2"])
    first = exploded(rows, cache_dir)
    built = files(cache_dir)
    assert exploded(rows, cache_dir, writer_batch_size=1, desc="Anything")._fingerprint == first._fingerprint
    assert files(cache_dir) == built


def test_marks_say_why_each_reject_is_not_kept(cache_dir):
    marked = mark_drops(table([GOLD, "", WRONG, WRONG], []), "exact", "sqlite", cache_dir=cache_dir)
    assert marked["drop_cause"][:] == [["same_as_gold", "empty", "", "duplicate"], []]
