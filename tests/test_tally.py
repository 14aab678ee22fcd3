"""What `summary` promises: every candidate counted once, by cause, from columns alone."""

from contextlib import suppress
from html.parser import HTMLParser

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2s_pref import (
    SamplingSettings,
    Summary,
    UserError,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    summary,
    verify_rejected,
)
from t2s_pref.tally import CAUSES, UNPROVEN
from t2s_pref.verdicts import GOLD_USABLE, GOLD_VERDICTS, VERDICTS, WRONG

GOLD = "SELECT name FROM singer"
REJECTS = [GOLD, GOLD.lower(), "", "SELECT 1", "SELECT 1 ", "select 1", "SELECT 2"]
DEDUPS = ("none", "exact", "normalized")


def run(*rows):
    """What sampling returns: each row is its candidates, a status or the SQL of a sampled one."""
    lost = set(CAUSES) & {"truncated", "no_sql", "prompt_too_long"}
    columns = {
        "output": [GOLD] * len(rows),
        "rejected": [[each for each in row if each not in lost] for row in rows],
        "candidate_status": [[each if each in lost else "sampled" for each in row] for row in rows],
        "generated_tokens": [[10] * len(row) for row in rows],
        "generation_seconds": [0.5 * len(row) for row in rows],
    }
    strings, counts = List(Value("string")), List(Value("int64"))
    types = [Value("string"), strings, strings, counts, Value("float64")]
    return Dataset.from_dict(columns, features=Features(dict(zip(columns, types, strict=True))))


def tell(dataset, cache_dir, dedup="none"):
    return summary(dataset, dedup, cache_dir=cache_dir)


CANDIDATES = st.lists(st.sampled_from([*REJECTS, "truncated", "no_sql", "prompt_too_long"]), max_size=5)


@given(st.lists(CANDIDATES, max_size=6), st.sampled_from(DEDUPS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_run_gave_its_pairs_and_drops_are_all_its_candidates(tmp_path, rows, dedup):
    sampled = run(*rows)
    told = tell(sampled, tmp_path, dedup)
    assert told.pairs + sum(told.drops.values()) == told.candidates == sum(map(len, rows))
    assert told.rows == len(rows)
    pairs = explode_rejected(sampled, dedup, cache_dir=tmp_path)
    assert told.pairs == len(pairs)
    kept_in = sum(1 for candidates in sampled["rejected"] if set(candidates) & set(pairs["rejected"][:]))
    assert sum(told.rows_without_pair.values()) == told.rows - kept_in
    assert all(told.drops.values())
    assert all(set(causes) <= set(CAUSES) for causes in told.rows_without_pair)


UNVERIFIED = {"truncated", "prompt_too_long", "no_sql", "empty", "same_as_gold", "duplicate"}


def test_each_cause_is_counted_for_what_it_is(cache_dir):
    sampled = run(["truncated", "no_sql", "prompt_too_long", "", GOLD.lower(), "SELECT 1", "SELECT 1"])
    assert tell(sampled, cache_dir, "exact").drops == dict.fromkeys(UNVERIFIED, 1)
    assert tell(sampled, cache_dir).drops == {cause: 1 for cause in UNVERIFIED if cause != "duplicate"}


def test_rows_without_a_pair_are_counted_by_all_the_causes_that_left_them_without(cache_dir):
    sampled = run([GOLD, "truncated"], ["truncated", GOLD], ["truncated"] * 2, ["SELECT 1", GOLD], [])
    told = tell(sampled, cache_dir)
    assert told.rows_without_pair == {("same_as_gold", "truncated"): 2, ("truncated",): 1, (): 1}
    table = {label: (value, share) for label, value, share in told.lines()}
    assert table["rows without a pair"] == ("4", "80.0 %")
    assert table["  by cause: the gold again + reached the length cap"] == ("2", "40.0 %")
    assert table["  by cause: no candidates"] == ("1", "20.0 %")


def test_counts_stand_beside_their_share(cache_dir):
    told = tell(run(*[["SELECT 1", "SELECT 2", GOLD]] * 400, ["truncated"] * 3), cache_dir)
    table = {label: (value, share) for label, value, share in told.lines()}
    assert table["rows"] == ("401", "")
    assert table["candidates"] == ("1,203", "")
    assert table["kept as pairs"] == ("800", "66.5 %")
    assert table["dropped: the gold again"] == ("400", "33.3 %")
    assert table["dropped: reached the length cap"] == ("3", "0.2 %")
    assert table["rows without a pair"] == ("1", "0.2 %")


def test_a_cause_that_did_not_occur_has_no_line(cache_dir):
    assert "dropped" not in str(tell(run(["SELECT 1"]), cache_dir))


def test_tokens_a_second_are_those_of_the_decoding(cache_dir):
    told = tell(run(["SELECT 1", "SELECT 2"], ["truncated"]), cache_dir)
    assert (told.tokens, told.seconds) == (30, 1.5)
    lines = str(told).splitlines()
    assert any(line.split() == ["tokens", "generated", "30"] for line in lines)
    assert any(line.startswith("tokens a second") and line.endswith(" 20") for line in lines)


@pytest.mark.parametrize(
    ("candidate", "setting"),
    [
        ("truncated", "--max-new-tokens"),
        ("prompt_too_long", "longer context"),
        ("no_sql", "keep_raw"),
        ("", "keep_raw"),
        (GOLD, "--temperature"),
        ("SELECT 1", "--top-p"),
    ],
)
def test_a_cause_that_costs_a_tenth_of_the_candidates_comes_with_the_setting_to_turn(cache_dir, candidate, setting):
    others = [f"SELECT {number}" for number in range(100, 108)]
    told = tell(run(["SELECT 1", *others, candidate]), cache_dir, "exact")
    (hint,) = told.hints()
    assert hint.startswith("10.0 % of the candidates: ")
    assert setting in hint
    assert f"hint: {hint}" in str(told).splitlines()
    assert not tell(run(["SELECT 1", *others, "SELECT 0", candidate]), cache_dir, "exact").hints()


def test_the_text_has_one_line_a_number_with_aligned_columns(cache_dir):
    text = str(tell(run(["SELECT 1", GOLD, "truncated"], [GOLD]), cache_dir))
    lines = [line for line in text.splitlines() if not line.startswith("hint")]
    assert lines == [
        UNPROVEN,
        "rows                                          2",
        "candidates                                    4",
        "kept as pairs                                 1   25.0 %",
        "dropped: reached the length cap               1   25.0 %",
        "dropped: the gold again                       2   50.0 %",
        "rows without a pair                           1   50.0 %",
        "  by cause: the gold again                    1   50.0 %",
        "characters of a chosen answer                23",
        "characters of a rejected answer               8",
        "characters between a pair's sides            15",
        "pairs whose chosen answer is longer           1  100.0 %",
        "tokens generated                             40",
        "tokens a second, a process                   20",
    ]


class Reader(HTMLParser):
    """Collects the tags, which must close in order, and the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_jupyter_shows_a_table_with_the_same_numbers_and_everything_escaped(cache_dir):
    told = tell(run(["SELECT 1", GOLD, "truncated"]), cache_dir)
    odd = Summary(**{**vars(told), "notes": ("generate_rejected: <script>alert('1')</script> & more",)})
    page = Reader(odd._repr_html_())
    assert "script" not in page.tags
    assert "<script>alert('1')</script> & more" in page.text
    assert page.tags.count("tr") == len(told.lines())
    assert all(cell in page.text for line in told.lines() for cell in line)
    assert page.tags.count("li") == len(told.hints()) > 0
    assert "ul" not in Reader(tell(run(["SELECT 1"]), cache_dir)._repr_html_()).tags


def test_the_splits_of_a_dict_are_counted_together(cache_dir):
    one, other = run(["SELECT 1", GOLD], ["truncated"]), run([GOLD, GOLD], ["truncated"], ["SELECT 2"])
    told = tell(DatasetDict(train=one, test=other), cache_dir)
    assert (told.rows, told.candidates, told.pairs) == (5, 7, 2)
    assert told.drops == {"same_as_gold": 3, "truncated": 2}
    assert told.rows_without_pair == {("truncated",): 2, ("same_as_gold",): 1}
    assert (told.tokens, told.seconds) == (70, 3.5)


def test_a_dataset_made_by_hand_needs_only_gold_and_rejects(cache_dir):
    told = tell(Dataset.from_dict({"output": [GOLD, GOLD], "rejected": [["SELECT 1", GOLD], []]}), cache_dir)
    assert (told.rows, told.candidates, told.pairs) == (2, 2, 1)
    assert told.drops == {"same_as_gold": 1}
    assert told.rows_without_pair == {(): 1}
    assert "tokens" not in str(told)
    assert told.notes == (UNPROVEN,)


def test_a_dataset_without_rows_has_a_summary_of_zeros(cache_dir):
    for empty in (run(), run(["SELECT 1"]).select([])):
        told = tell(empty, cache_dir)
        assert (told.rows, told.candidates, told.pairs, told.drops, told.rows_without_pair) == (0, 0, 0, {}, {})
        assert "%" not in str(told)
        Reader(told._repr_html_())


def test_what_is_not_counted_is_refused_in_one_line(cache_dir):
    for wrong in (
        run(["SELECT 1"]).remove_columns("rejected"),
        explode_rejected(run(["SELECT 1"]), cache_dir=cache_dir),
        run(["SELECT 1"]).to_iterable_dataset(),
    ):
        with pytest.raises(UserError) as refused:
            tell(wrong, cache_dir)
        assert "\n" not in str(refused.value)


def test_counting_changes_nothing(cache_dir):
    sampled = run(["SELECT 1", GOLD])
    before = sampled[:], sampled.features.copy(), sampled._fingerprint
    tell(sampled, cache_dir)
    assert (sampled[:], sampled.features, sampled._fingerprint) == before


def test_a_cached_run_has_the_same_summary_and_names_its_model(rows, cache_dir, tiny_model):
    few = rows.select(range(4))
    drawing = SamplingSettings(num_rejects=2, max_new_tokens=6)
    first = tell(generate_rejected(few, str(tiny_model), drawing, cache_dir=cache_dir), cache_dir)
    second = tell(generate_rejected(few, str(tiny_model), drawing, cache_dir=cache_dir), cache_dir)
    assert str(second) == str(first)
    assert second == first
    assert first.candidates == 8
    model = f"generate_rejected: {tiny_model}, no adapter; prompts' common beginnings held once"
    assert first.notes == (*rows.info.description.splitlines(), model, UNPROVEN)
    assert str(first).startswith("load_sft: ")


def test_skipped_rows_are_told_of_in_the_summary(cache_dir):
    loaded = load_sft(Dataset.from_dict({"instruction": ["a", "b"], "input": ["", ""], "output": [GOLD, ""]}))
    told = tell(loaded.add_column("rejected", [["SELECT 1"]]), cache_dir)
    assert told.notes == ("load_sft: 2 rows read, 1 skipped for an empty gold", UNPROVEN)


def test_no_run_claims_that_its_rejects_are_proven_wrong(cache_dir):
    assert "none of them was executed or proven wrong" in str(tell(run(["SELECT 1"]), cache_dir))


def test_the_notes_of_several_splits_are_each_said_once(cache_dir):
    loaded = load_sft(Dataset.from_dict({"instruction": ["a"], "input": [""], "output": [GOLD]}))
    loaded = loaded.add_column("rejected", [["SELECT 1"]])
    assert len(tell(DatasetDict(a=loaded, b=loaded), cache_dir).notes) == 2


# -- verified runs ---------------------------------------------------------------------------------------------------


def verified(*rows, gold="ok"):
    """Rows of (verdict, ...), each of a reject of its own."""
    return Dataset.from_dict(
        {
            "output": [GOLD] * len(rows),
            "rejected": [[f"SELECT {row}, {place}" for place in range(len(found))] for row, found in enumerate(rows)],
            "verdict": [list(found) for found in rows],
            "gold_verdict": [gold] * len(rows),
        },
        features=Features(
            {
                "output": Value("string"),
                "rejected": List(Value("string")),
                "verdict": List(Value("string")),
                "gold_verdict": Value("string"),
            }
        ),
    )


@given(st.lists(st.lists(st.sampled_from(VERDICTS), max_size=4), max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_verdicts_are_counted_and_only_proven_rejects_are_pairs(tmp_path, rows):
    told = tell(verified(*rows), tmp_path)
    found = [verdict for row in rows for verdict in row]
    assert told.verdicts == {verdict: found.count(verdict) for verdict in VERDICTS if verdict in found}
    assert told.pairs == sum(verdict in WRONG for row in rows for verdict in row)
    assert told.pairs + sum(told.drops.values()) == told.candidates == sum(map(len, rows))
    assert told.mastered == sum(bool(row) and set(row) <= {"equivalent", "same_ast", "same_text"} for row in rows)
    assert sum(told.rows_without_pair.values()) == sum(not set(row) & set(WRONG) for row in rows)
    assert UNPROVEN not in told.notes
    assert str(told)
    assert told._repr_html_()


def test_a_row_is_without_a_pair_for_its_gold_or_because_it_is_mastered(cache_dir):
    told = tell(verified(["equivalent"], ["timeout"]), cache_dir)
    assert told.rows_without_pair == {("mastered",): 1, ("timeout",): 1}
    assert "  by cause: mastered: every candidate is right" in str(told)
    assert told.golds == {"ok": 2}
    told = tell(verified(["unverified"], [], gold="gold_error"), cache_dir)
    assert told.rows_without_pair == {("gold_error",): 2}
    assert told.golds == {"gold_error": 2}
    assert "  not: gold fails" in str(told)


def test_every_verdict_and_every_status_is_explained_in_words():
    assert set(VERDICTS) | set(GOLD_VERDICTS) - set(GOLD_USABLE) <= set(CAUSES)
    assert all(words and way_out for words, way_out in CAUSES.values())


@given(
    st.lists(st.lists(st.sampled_from(VERDICTS), max_size=5), max_size=4),
    st.sampled_from(DEDUPS),
    st.none() | st.sets(st.sampled_from(VERDICTS)),
    st.none() | st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_pairs_that_are_counted_are_those_that_explode_makes(tmp_path, rows, dedup, keep, most):
    found, chosen = verified(*rows), {"keep": keep, "max_per_row": most}
    told = summary(found, dedup, cache_dir=tmp_path, **chosen)
    assert told.pairs == len(explode_rejected(found, dedup, cache_dir=tmp_path, **chosen))
    assert told.pairs + sum(told.drops.values()) == told.candidates == sum(map(len, rows))
    assert sum(told.verdicts.values()) == told.candidates
    assert all(told.drops.values())
    assert set(told.drops) <= set(CAUSES)


def test_what_is_beyond_max_per_row_is_counted_for_that(cache_dir):
    told = summary(verified(["wrong_result"] * 3, ["wrong_result", "timeout"]), max_per_row=1, cache_dir=cache_dir)
    assert (told.pairs, told.drops) == (2, {"not_selected": 2, "timeout": 1})
    assert "dropped: more than --max-per-row" in str(told)
    assert any("raise --max-per-row" in hint for hint in told.hints())


def test_a_row_with_a_candidate_that_was_lost_is_not_mastered(cache_dir):
    sampled = run(["SELECT 1", "truncated"], ["SELECT 2"], [GOLD], [])
    found = sampled.add_column("verdict", [["equivalent"], ["equivalent"], ["same_text"], []])
    told = tell(found, cache_dir)
    assert told.mastered == 2
    assert told.rows_without_pair == {("equivalent", "truncated"): 1, ("mastered",): 2, (): 1}
    assert told.pairs + sum(told.drops.values()) == told.candidates == 4


def test_verdicts_and_golds_stand_in_one_order_with_their_shares(cache_dir):
    rows = [["timeout", "wrong_result"], ["equivalent", "wrong_result"]]
    told = tell(DatasetDict(a=verified(*rows), b=verified(["unverified"], gold="no_database")), cache_dir)
    assert list(told.verdicts) == ["wrong_result", "equivalent", "timeout", "unverified"]
    assert told.golds == {"ok": 2, "no_database": 1}
    table = {label: (value, share) for label, value, share in told.lines()}
    assert table["rows whose gold can prove something"] == ("2", "66.7 %")
    assert table["  not: no database"] == ("1", "33.3 %")
    assert table["verdicts"] == ("5", "")
    assert table["  wrong_result"] == ("2", "40.0 %")
    assert table["kept as pairs"] == ("2", "40.0 %")
    assert told.rows_without_pair == {("no_database",): 1}


def test_a_gold_that_proves_nothing_comes_with_where_to_look(cache_dir):
    told = tell(verified(["unverified"] * 3, gold="gold_nondeterministic"), cache_dir)
    assert told.drops == {"unverified": 3}
    (hint,) = told.hints()
    assert "audit" in hint
    assert "gold is not determined by the data" in str(told)


def test_jupyter_shows_the_verdicts_too(cache_dir):
    told = tell(verified(["wrong_result", "equivalent", "timeout"], ["equivalent"]), cache_dir)
    page = Reader(told._repr_html_())
    assert page.tags.count("tr") == len(told.lines())
    assert all(cell in page.text for line in told.lines() for cell in line)
    assert "  wrong_result" in page.text


def test_a_cached_verified_run_prints_the_same(tmp_path):
    files = demo_files()
    rows = load_sft(files.train).select(range(6))
    wrong = [[row["output"], f"{row['output']} x y", "SELECT 'no such answer'", ""] for row in rows]
    shown, pairs = [], []
    for _ in range(2):
        found = verify_rejected(rows.add_column("rejected", wrong), files.databases, cache_dir=tmp_path)
        told = summary(found, cache_dir=tmp_path)
        shown.append((str(told), told._repr_html_()))
        pairs.append(len(explode_rejected(found, cache_dir=tmp_path)))
        assert told.pairs == pairs[-1] > 0
        assert told.verdicts["same_text"] == told.verdicts["empty"] == told.verdicts["syntax_error"] == 6
        assert told.pairs + sum(told.drops.values()) == told.candidates == 24
    assert shown[0] == shown[1]
    assert "verify_rejected: SQLite" in shown[0][0]
    assert UNPROVEN not in shown[0][0]


def test_rejects_that_were_not_verified_are_no_pairs_among_those_that_were(cache_dir):
    # concatenate_datasets fills columns that one part lacks with null
    bare = verified(["wrong_result"]).remove_columns(["verdict", "gold_verdict"])
    mixed = concatenate_datasets([verified(["wrong_result"]), bare])
    with suppress(UserError):  # to refuse the mixture is as good
        told = tell(mixed, cache_dir)
        assert told.pairs == 1
        assert told.pairs + sum(told.drops.values()) == told.candidates == 2
