"""What `explode_rejected` promises: one pair a usable reject, nothing lost, nothing changed, found again."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import t2s_pref
from t2s_pref import UserError, explode_rejected
from t2s_pref.pairs import drop_causes, mark_drops
from t2s_pref.sql import normalize_sql
from t2s_pref.verdicts import VERDICTS
from t2s_pref.verdicts import WRONG as PROVEN_WRONG

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
    causes = drop_causes([gold or ""], rejects, dedup, "sqlite")
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
        if not drop_causes([gold], rejects, dedup, "sqlite")[place]
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


# -- verified rejects ------------------------------------------------------------------------------------------------


def verified(*found, **more):
    """One row whose rejects have these (verdict, digest, distance)."""
    verdicts, digests, distances = zip(*found, strict=True)
    return Dataset.from_dict(
        {
            "output": ["SELECT 0"],
            "rejected": [[f"SELECT {number}" for number in range(1, len(found) + 1)]],
            "verdict": [list(verdicts)],
            "verdict_detail": [["why"] * len(found)],
            "result_digest": [list(digests)],
            "distance": [list(distances)],
            "gold_verdict": ["ok"],
            "gold_detail": [""],
            **more,
        }
    )


ROW = (
    ("equivalent", "g", 0.1),
    ("wrong_result", "a", 0.5),
    ("wrong_result", "a", 0.2),
    ("timeout", "", 0.3),
    ("missing_table", "", 0.9),
    ("wrong_result", "b", 0.4),
    ("ambiguous", "c", 0.2),
)


def kept(cache_dir, *found, **kwargs):
    return explode_rejected(verified(*(found or ROW)), cache_dir=cache_dir, **kwargs)["rejected_index"][:]


def test_only_what_is_proven_wrong_is_kept_unless_other_verdicts_are_asked_for(cache_dir):
    assert kept(cache_dir) == kept(cache_dir, keep=PROVEN_WRONG) == [1, 2, 4, 5]
    assert kept(cache_dir, keep=["timeout", "missing_table"]) == [3, 4]
    assert kept(cache_dir, keep="ambiguous") == [6]
    assert kept(cache_dir, keep=[]) == []


def test_pairs_have_their_verdict_and_distance_and_no_column_of_the_row(cache_dir):
    pairs = explode_rejected(verified(*ROW), cache_dir=cache_dir)
    assert pairs.column_names == [
        *("output", "rejected", "verdict", "verdict_detail", "distance", "chosen", "rejected_index")
    ]
    assert pairs["verdict"][:] == ["wrong_result", "wrong_result", "missing_table", "wrong_result"]
    assert pairs["distance"][:] == [0.5, 0.2, 0.9, 0.4]


def test_the_nearest_or_the_most_diverse_come_first_where_only_some_are_kept(cache_dir):
    assert kept(cache_dir, max_per_row=2) == [1, 2]
    assert kept(cache_dir, max_per_row=2, select="hardest") == [2, 5]
    assert kept(cache_dir, max_per_row=2, select="diverse") == [1, 4]  # another verdict
    assert kept(cache_dir, max_per_row=3, select="diverse") == [1, 4, 5]  # another result
    assert kept(cache_dir, max_per_row=9, select="diverse") == [1, 2, 4, 5]


@given(
    st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from("abc"), st.floats(0, 1)), min_size=1, max_size=8),
    st.sampled_from(["first", "hardest", "diverse"]),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_selected_it_is_proven_and_no_more_than_asked_for(cache_dir, found, select, most):
    pairs = explode_rejected(verified(*found), select=select, max_per_row=most, cache_dir=cache_dir)
    proven = sum(verdict in PROVEN_WRONG for verdict, _, _ in found)
    assert len(pairs) == min(most, proven)
    assert set(pairs["verdict"]) <= set(PROVEN_WRONG)
    if select == "hardest" and len(pairs):
        left = sorted(distance for verdict, _, distance in found if verdict in PROVEN_WRONG)
        assert sorted(pairs["distance"]) == left[:most]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": ["wrong"]}, "keep has 'wrong', which is no verdict"),
        ({"select": "best", "max_per_row": 1}, "select is 'best'; it must be one of first, hardest, diverse"),
        ({"select": "hardest"}, "max_per_row, which is not given"),
        ({"max_per_row": 0}, "max_per_row is 0"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(cache_dir, arguments, message):
    with pytest.raises(UserError, match=message):
        explode_rejected(verified(*ROW), cache_dir=cache_dir, **arguments)


def test_what_is_right_is_either_chosen_or_kept_as_a_reject(cache_dir):
    rows = Dataset.from_dict({"output": ["SELECT 1"], "rejected": [["SELECT 2"]], "verdict": [["equivalent"]]})
    assert len(explode_rejected(rows, keep=["equivalent"], cache_dir=cache_dir)) == 1
    with pytest.raises(UserError, match="keep has 'equivalent', and chosen='own' chooses what is right"):
        explode_rejected(rows, keep=["equivalent"], chosen="own", cache_dir=cache_dir)


def test_choices_that_need_verdicts_say_who_adds_them(cache_dir):
    bare = Dataset.from_dict({"output": ["SELECT 0"], "rejected": [["SELECT 1"]]})
    for arguments in (
        {"keep": PROVEN_WRONG},
        {"select": "hardest", "max_per_row": 1},
        {"select": "diverse", "max_per_row": 1},
    ):
        with pytest.raises(UserError, match="verify_rejected"):
            explode_rejected(bare, cache_dir=cache_dir, **arguments)


def test_another_accepted_gold_is_never_a_reject(cache_dir):
    rows = verified(("wrong_result", "a", 0.1), ("wrong_result", "b", 0.1), alternatives=[["select  2"]])
    assert explode_rejected(rows, cache_dir=cache_dir)["rejected"][:] == ["SELECT 1"]


def many(*rows, **more):
    """Rows whose rejects have these (verdict, digest, distance)."""
    parts = [verified(*row, **more) for row in rows]
    return datasets.concatenate_datasets(parts)


FOUND = st.tuples(st.sampled_from(VERDICTS), st.sampled_from("abc"), st.floats(0, 1))
CHOICES = {
    "dedup": st.sampled_from(["none", "exact", "normalized"]),
    "select": st.sampled_from(["first", "hardest", "diverse"]),
    "max_per_row": st.integers(1, 4),
}


@given(st.lists(st.lists(FOUND, min_size=1, max_size=6), min_size=1, max_size=4), st.fixed_dictionaries(CHOICES))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_arguments_what_may_be_right_is_no_pair(cache_dir, rows, choices):
    pairs = explode_rejected(many(*rows), cache_dir=cache_dir, **choices)
    assert set(pairs["verdict"]) <= set(PROVEN_WRONG)
    assert len(pairs) == sum(min(choices["max_per_row"], sum(each[0] in PROVEN_WRONG for each in row)) for row in rows)


@given(st.lists(FOUND, min_size=1, max_size=6), st.sets(st.sampled_from(VERDICTS)))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_what_is_asked_for_is_kept(cache_dir, found, keep):
    pairs = explode_rejected(verified(*found), keep=keep, cache_dir=cache_dir)
    assert pairs["rejected_index"][:] == [place for place, each in enumerate(found) if each[0] in keep]


@given(st.lists(st.sampled_from(VERDICTS), max_size=6), st.sets(st.sampled_from(VERDICTS)))
@settings(deadline=None, max_examples=200)
def test_what_equals_a_gold_as_text_is_never_kept_whatever_its_verdict(found, keep):
    golds = ["SELECT a FROM t", "SELECT b FROM t"]
    texts = [*golds, "select a from T;", "```sql\nSELECT b FROM t\n```", "", None][: len(found)]
    causes = drop_causes(golds, texts, "none", "sqlite", found, keep)
    assert set(causes) <= {"same_as_gold", "empty"}


OF_FEW_KINDS = st.tuples(st.sampled_from(PROVEN_WRONG[:3]), st.sampled_from("abc"), st.just(0.5))


@given(st.lists(OF_FEW_KINDS, min_size=1, max_size=8), st.integers(1, 5))
@example([("wrong_result", "a", 0.5), ("wrong_result", "b", 0.5), ("missing_table", "", 0.5)], 2)
@example([("wrong_result", "a", 0.5), ("wrong_result", "a", 0.5), ("wrong_result", "b", 0.5)], 2)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_diverse_means_as_many_verdicts_and_as_many_results_as_can_be(cache_dir, found, most):
    rows = verified(*found)
    pairs = explode_rejected(rows, select="diverse", max_per_row=most, cache_dir=cache_dir)
    chosen = [found[place] for place in pairs["rejected_index"]]
    assert len({verdict for verdict, _, _ in chosen}) == min(most, len({verdict for verdict, _, _ in found}))
    results = {(verdict, digest) for verdict, digest, _ in found}
    assert len({(verdict, digest) for verdict, digest, _ in chosen}) == min(most, len(results))
    assert pairs["rejected_index"][:] == sorted(pairs["rejected_index"])


def test_of_rejects_equally_far_the_first_is_the_hardest(cache_dir):
    found = [("wrong_result", "a", 0.5)] * 3
    assert kept(cache_dir, *found, select="hardest", max_per_row=2) == [0, 1]


def test_duplicates_do_not_count_among_those_that_are_kept(cache_dir):
    rows = verified(*[("wrong_result", "a", 0.5)] * 4)
    rows = rows.remove_columns("rejected").add_column("rejected", [["SELECT 1", "select 1", "SELECT 2", "SELECT 3"]])
    pairs = explode_rejected(rows, "normalized", max_per_row=2, cache_dir=cache_dir)
    assert pairs["rejected_index"][:] == [0, 2]


def test_max_per_row_needs_no_verdicts_and_counts_each_row_for_itself(cache_dir):
    rows = table(["SELECT 1", "SELECT 2", "SELECT 3"], [GOLD, "SELECT 4"], [])
    assert exploded(rows, cache_dir, max_per_row=1)["rejected"][:] == ["SELECT 1", "SELECT 4"]


def test_what_verification_adds_to_a_pair_has_its_type_with_and_without_pairs(cache_dir):
    types = {"verdict": Value("string"), "verdict_detail": Value("string"), "distance": Value("float64")}
    for rows in (verified(*ROW), verified(("equivalent", "", 0.0)), verified(*ROW).select([])):
        pairs = explode_rejected(rows, cache_dir=cache_dir)
        assert {name: pairs.features[name] for name in types} == types
        assert not {"result_digest", "gold_verdict", "gold_detail", "drop_cause"} & set(pairs.column_names)


def test_choices_are_part_of_the_key_but_not_how_they_are_written(cache_dir):
    rows = verified(*ROW)
    given = [
        *({}, {"keep": PROVEN_WRONG}, {"keep": list(reversed(PROVEN_WRONG))}, {"keep": set(PROVEN_WRONG)}),
        *({"keep": "timeout"}, {"max_per_row": 1}, {"max_per_row": 1, "select": "hardest"}, {"max_per_row": 2}),
    ]
    marks = [explode_rejected(rows, cache_dir=cache_dir, **choice)._fingerprint for choice in given]
    assert len(set(marks[:4])) == 1
    assert len(set(marks)) == 5


def test_verified_splits_are_exploded_each(cache_dir):
    both = explode_rejected(DatasetDict(train=verified(*ROW), test=verified(ROW[0])), cache_dir=cache_dir)
    assert {name: part["verdict"][:] for name, part in both.items()} == {
        "train": ["wrong_result", "wrong_result", "missing_table", "wrong_result"],
        "test": [],
    }


def test_rows_that_were_not_verified_among_those_that_were_are_refused(refusal):
    # concatenate_datasets fills columns that one part lacks with null
    mixed = datasets.concatenate_datasets([verified(*ROW), table(["SELECT 8", "SELECT 9"])])
    assert mixed["verdict"][1] is None
    assert "2 rejects and 0 verdicts" in refusal(mixed)


def test_verdicts_that_do_not_match_the_rejects_one_by_one_are_refused(refusal):
    short = verified(*ROW).remove_columns("rejected").add_column("rejected", [["SELECT 1"] * (len(ROW) + 1)])
    assert "verdict" in refusal(short)


def test_alternatives_that_are_null_or_empty_are_none(cache_dir):
    for nothing in (None, [], [None], ["", None]):
        rows = table([WRONG], alternatives=[nothing])
        assert exploded(rows, cache_dir)["rejected"][:] == [WRONG]
