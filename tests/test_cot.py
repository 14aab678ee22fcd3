"""Chains of thought: what a teacher's answer must be to be kept, and pairs whose two sides both reason."""

import json
import re
from contextlib import closing
from pathlib import Path
from sqlite3 import connect

import pytest
from datasets import Dataset, DatasetDict
from transformers_serve import TransformersServe

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    cot_summary,
    demo,
    demo_files,
    explode_cot,
    explode_rejected,
    generate_cot,
    generate_rejected,
    load_sft,
    save_llamafactory,
    summary,
)
from t2s_pref.betrayal import betrayal
from t2s_pref.chains import attach_cot
from t2s_pref.cli import main
from t2s_pref.cot import _judged
from t2s_pref.formats import FORMATS, REQUEST
from t2s_pref.prompts import messages, teacher_row
from t2s_pref.verdicts import RIGHT, WRONG

FILES = demo_files()
ROWS = 30
SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=256, answer_format="fenced")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cot")


@pytest.fixture(scope="module")
def rows():
    return load_sft(FILES.train).select(range(ROWS))


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(FILES.reasoner, device="cpu")


def settings(style):
    return SamplingSettings(**{**vars(SETTINGS), "answer_format": style, "enable_thinking": style == "think"})


@pytest.fixture(scope="module", params=["fenced", "think"])
def style(request):
    return request.param


@pytest.fixture(scope="module")
def taught(rows, engine, style, cache):
    return generate_cot(rows, engine, settings(style), databases=FILES.databases, cache_dir=cache)


@pytest.fixture(scope="module")
def sampled(taught, engine, style, cache):
    return generate_rejected(
        taught, engine, settings(style), databases=FILES.databases, chosen="own_or_gold", cache_dir=cache
    )


@pytest.fixture(scope="module")
def pairs(sampled, cache):
    return explode_rejected(sampled, dedup="normalized", chosen="own_or_gold", cache_dir=cache)


def result(db_id, sql):
    """The rows of a query, by a connection of our own."""
    with closing(connect(f"file:{FILES.databases}/{db_id}/{db_id}.sqlite?mode=ro", uri=True)) as database:
        return sorted(map(repr, database.execute(sql)))


# -- a teacher's chains of thought -----------------------------------------------------------------------------------


def test_a_teacher_sees_schema_question_and_gold_and_the_policy_never_sees_the_gold(rows):
    for row in rows:
        shown = messages(teacher_row(row, row["output"]))[-1]["content"]
        assert row["input"] in shown
        assert row["output"] in shown
        assert row["output"] not in messages(row)[-1]["content"]


def test_a_schema_in_the_system_message_or_the_history_reaches_the_teacher():
    row = {"instruction": "", "input": "How many?", "system": "CREATE TABLE a (b)", "history": [["x", "y"]]}
    chat = messages(teacher_row(row, "SELECT 1"))
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "user"]
    assert chat[0]["content"] == row["system"]
    assert "How many?" in chat[-1]["content"]


def test_what_is_kept_is_in_the_format_right_by_execution_and_betrays_nothing(taught, style):
    assert sum(map(len, taught["cot"])) > ROWS
    for row in taught:
        for text in row["cot"]:
            reasoning, sql = FORMATS[style].read(text)
            assert text == FORMATS[style].write(reasoning, sql)
            assert result(row["db_id"], sql) == result(row["db_id"], row["output"])
            assert not betrayal(reasoning)
            assert len(reasoning) > 20


def test_every_sample_is_counted_by_what_became_of_it(taught):
    told = cot_summary(taught)
    statuses = [status for each in taught["cot_status"] for status in each]
    assert told.samples == len(statuses) == 3 * ROWS
    assert told.kept == statuses.count("kept") == sum(map(len, taught["cot"]))
    assert told.kept + sum(told.drops.values()) == told.samples
    assert told.rows_without == sum(not each for each in taught["cot"])
    assert set(told.drops) - {"duplicate", "betrays", "off_format"} <= {*WRONG, "ambiguous", "weak", "no_sql"}
    assert f"{told.kept}" in str(told)
    assert "generate_cot: " in str(told)


def test_all_columns_of_the_rows_stay_as_they_were(taught, rows):
    assert taught.column_names == [*rows.column_names, "cot", "cot_status"]
    assert taught.remove_columns(["cot", "cot_status"])[:] == rows[:]


def test_the_second_call_samples_nothing_and_gives_the_same(rows, style, taught, cache):
    engine = TransformersEngine(FILES.reasoner, device="cpu")
    again = generate_cot(rows, engine, settings(style), databases=FILES.databases, cache_dir=cache)
    assert again[:] == taught[:]
    assert again._fingerprint == taught._fingerprint
    assert engine.work.generated == 0


def test_both_formats_are_made_of_the_same_answers_of_the_teacher(rows, engine, cache):
    found = {}
    for style in ("fenced", "think"):
        of = generate_cot(rows, engine, settings(style), databases=FILES.databases, cache_dir=cache)
        found[style] = [[FORMATS[style].read(text) for text in each] for each in of["cot"]]
    assert found["fenced"] == found["think"]


def test_without_databases_what_differs_from_the_gold_as_text_is_dropped(rows, engine, cache):
    taught = generate_cot(rows, engine, SETTINGS, cache_dir=cache)
    told = cot_summary(taught)
    assert told.kept > 0
    assert told.drops["differs"] > 0
    for row in taught:
        assert all(FORMATS["fenced"].read(text).sql.rstrip(";") == row["output"] for text in row["cot"])


def sample(reasoning, sql="SELECT 1", **row):
    text = FORMATS["fenced"].write(reasoning, sql)
    row = {"output": "SELECT 1", "candidate_status": ["sampled"], "answers": [text], "rejected": [sql], **row}
    return _judged(row, "fenced", "sqlite")


@pytest.mark.parametrize(
    "text",
    [
        "The given SQL query counts the books.",
        "According to the provided query, we need book.",
        "As the reference answer shows, one table is enough.",
        "The gold SQL joins two tables.",
        "The query given above filters by year.",
        "The SQL provided uses COUNT.",
        "The query that was given to me groups by genre.",
        "Looking at the answer above, we see a join.",
        "The correct SQL is given above.",
        "This matches the expected\nquery.",
        "The target SQL statement is simple.",
        "I was given the query, so the reasoning is easy.",
        "It agrees with the ground truth.",
        "The answer key says so.",
        "We are told the correct query.",
        "The query joins two tables, as shown in the example solution.",
        "Based on the SQL shown, we need COUNT(*).",
        "The query you shared uses a LEFT JOIN, so we follow that.",
        "Working backwards from the query, the tables needed are book and author.",
        "The answer we've been given uses GROUP BY.",
        "The user gave me the query, so I only explain it.",
        "I must not mention that the query was given.",
        "The user's query uses DISTINCT, so there may be duplicates.",
        "We are provided with the query and have to explain it.",
        "The task gives us the SQL: it uses two joins.",
        "The query mentioned above uses two joins.",
        "To match the query, I need to alias the tables.",
        "题目中给的SQL使用了连接。",
        "上面的查询使用了GROUP BY。",
        "根据给定的SQL，我们需要两张表。",
        "参考答案使用了连接。",
        "The final query was provided.",
    ],
)
def test_a_mention_of_a_given_answer_is_dropped(text):
    assert betrayal(text)
    assert sample(f"We need one table. {text} Done.", verdict=["same_text"]) == ([], ["betrays"])


@pytest.mark.parametrize(
    "text",
    [
        "We need the books of a given author.",
        "The question gives a year, so the condition is on year.",
        "The schema provided has three tables.",
        "The foreign key references author.",
        "Given the question, the query needs a join.",
        "The query should return the titles.",
        "The answer is title.",
        "The final query counts rows.",
        "Loans that were given back have a date.",
        "We provide the titles in order of the reference number.",
        "The expected arrival is in the column eta.",
        "The gold medal winners are in medal.",
        "The table above has the columns that we need.",
        "The correct answer needs a LEFT JOIN, because books without loans count as well.",
        "问题给出了年份，因此条件是年份。",
        "The expected output is just the title.",
        "The set code given as 'KTK' refers to cards.setCode.",
        "Given the language code 'zh', the filter is languageCode = 'zh'.",
        "The reference code of the order, 'A-17', is the filter; the order status is what is asked.",
        "Users that provided answers to at least three questions are counted by answers.id.",
        "Combining everything, the final SQL query is given below.",
        "Given the question, the query must group by genre.",
        "Power plants with output above 100 MW have output > 100; the answer above 50 points counts as good.",
        "We must provide the SQL that counts the rows.",
        "The total output given by each plant is SUM(output).",
        "Step 2: Use that id to find the albums. Putting this together gives the following query:",
        "题目给出的查询条件是国家为法国，因此过滤 country = 'France'。",
        "需要提供SQL来统计每个部门的人数。",
    ],
)
def test_ordinary_reasoning_is_kept(text):
    assert betrayal(text) == ""
    kept, statuses = sample(text, verdict=["equivalent"])
    assert statuses == ["kept"]
    assert text in kept[0]


@pytest.mark.parametrize("verdict", [*WRONG, "ambiguous", "weak", "timeout", "unverified"])
def test_what_is_not_proven_right_is_dropped_under_its_verdict(verdict):
    assert sample("One table.", verdict=[verdict]) == ([], [verdict])


@pytest.mark.parametrize("verdict", RIGHT)
def test_what_is_right_is_kept(verdict):
    assert sample("One table.", verdict=[verdict])[1] == ["kept"]


def test_the_same_text_is_kept_once():
    text = FORMATS["fenced"].write("One table.", "SELECT 1")
    row = {"candidate_status": ["sampled", "truncated", "sampled"], "answers": [text] * 2, "rejected": ["SELECT 1"] * 2}
    assert sample("", verdict=["same_text"] * 2, **row) == ([text], ["kept", "truncated", "duplicate"])


def test_another_accepted_gold_is_as_good_where_nothing_is_run():
    assert sample("One table.", "select 2", alternatives=["SELECT 2"])[1] == ["kept"]
    assert sample("One table.", "select 2")[1] == ["differs"]


def test_rows_to_train_on_have_the_chain_of_thought_as_output_and_ask_for_their_format(taught, style, cache, tmp_path):
    sft = explode_cot(taught, cache_dir=cache)
    assert len(sft) == sum(map(len, taught["cot"]))
    assert "cot" not in sft.column_names
    assert sft["output"][:] == [text for each in taught["cot"] for text in each]
    assert all(text.endswith(REQUEST) == (style == "fenced") for text in sft["input"])
    assert len(explode_cot(taught, 1, cache_dir=cache)) == sum(map(bool, taught["cot"]))
    path = save_llamafactory(sft, tmp_path / "cot_sft.json")
    assert {tuple(record) for record in json.loads(path.read_text())} == {("instruction", "input", "output", "db_id")}
    entry = json.loads((tmp_path / "dataset_info.json").read_text())["cot_sft"]
    assert entry["columns"] == {"prompt": "instruction", "query": "input", "response": "output"}


def test_splits_and_empty_datasets_are_taken(rows, engine, cache):
    both = DatasetDict(a=rows.select(range(2)), b=rows.select([]))
    taught = generate_cot(both, engine, SETTINGS, databases=FILES.databases, cache_dir=cache)
    assert [len(taught[name]["cot_status"]) for name in both] == [2, 0]
    assert cot_summary(taught).samples == 6
    assert len(explode_cot(taught, cache_dir=cache)["b"]) == 0


def test_a_dataset_that_was_sampled_before_keeps_its_candidates(sampled, engine, cache):
    again = generate_cot(sampled, engine, SETTINGS, databases=FILES.databases, cache_dir=cache)
    for name in ("rejected", "answers", "verdict", "candidate_status"):
        assert again[name][:] == sampled[name][:]


def test_what_makes_no_sense_is_refused(rows, engine, cache):
    with pytest.raises(UserError, match="a chain of thought has one of fenced, think"):
        generate_cot(rows, engine, SamplingSettings(), cache_dir=cache)
    with pytest.raises(UserError, match="generate_cot adds"):
        explode_cot(rows)
    with pytest.raises(UserError, match="max_per_row is 0"):
        explode_cot(rows, 0)


# -- the policy's ----------------------------------------------------------------------------------------------------


def test_candidates_are_reasoning_with_the_sql_that_was_judged(sampled, style):
    for row in sampled:
        assert len(row["answers"]) == len(row["rejected"]) == len(row["verdict"])
        for answer, sql in zip(row["answers"], row["rejected"], strict=True):
            assert FORMATS[style].read(answer).sql == sql
    assert sum(map(len, sampled["answers"])) > 2 * ROWS


def test_pairs_reason_on_both_sides_in_one_format_right_against_wrong(pairs, sampled, style):
    assert len(pairs) > 5
    kept = dict(zip(sampled["source_index"], sampled["cot"], strict=True))
    own = dict(zip(sampled["source_index"], sampled["answers"], strict=True))
    for pair in pairs:
        chosen, rejected = (FORMATS[style].read(pair[side]) for side in ("chosen", "rejected"))
        assert result(pair["db_id"], chosen.sql) == result(pair["db_id"], pair["output"])
        assert pair["verdict"] in WRONG
        if pair["verdict"] == "wrong_result":
            assert result(pair["db_id"], rejected.sql) != result(pair["db_id"], pair["output"])
        assert pair["chosen"] in (own if pair["chosen_from"] == "own" else kept)[pair["source_index"]]
        assert pair["input"].endswith(REQUEST) == (style == "fenced")


def test_the_golds_chain_of_thought_is_chosen_only_where_the_model_has_none(pairs, sampled, cache):
    right = {
        index: bool(set(verdicts) & set(RIGHT))
        for index, verdicts in zip(sampled["source_index"], sampled["verdict"], strict=True)
    }
    assert all((pair["chosen_from"] == "own") == right[pair["source_index"]] for pair in pairs)
    gold = explode_rejected(sampled, dedup="normalized", chosen="gold", cache_dir=cache)
    assert set(gold["chosen_from"]) == {"gold"}
    cots = dict(zip(sampled["source_index"], sampled["cot"], strict=True))
    assert all(pair["chosen"] in cots[pair["source_index"]] for pair in gold)
    own = explode_rejected(sampled, dedup="normalized", chosen="own", cache_dir=cache)
    assert set(own["chosen_from"]) == {"own"}


def test_lengths_are_reported_of_the_whole_answers(pairs, sampled, cache):
    told = summary(sampled, dedup="normalized", chosen="own_or_gold", cache_dir=cache)
    assert told.pairs == len(pairs)
    assert told.lengths == (sum(map(len, pairs["chosen"])), sum(map(len, pairs["rejected"])))
    assert told.gap == sum(abs(len(pair["chosen"]) - len(pair["rejected"])) for pair in pairs)
    assert told.longer == sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    assert f"{told.lengths[0] / told.pairs:,.0f}" in str(told)


def test_the_closest_lengths_are_closer_than_as_sampled(sampled, cache):
    gaps = {}
    for select in ("first", "closest_length"):
        of = explode_rejected(
            sampled, dedup="normalized", chosen="own_or_gold", select=select, max_per_row=1, cache_dir=cache
        )
        gaps[select] = sum(abs(len(pair["chosen"]) - len(pair["rejected"])) for pair in of)
    assert gaps["closest_length"] < gaps["first"]


def test_candidates_that_reason_are_never_paired_with_a_bare_gold(sampled, cache):
    with pytest.raises(UserError, match="generate_cot adds it, or chosen='own'"):
        explode_rejected(sampled.remove_columns("cot"), cache_dir=cache)


def test_sampled_anew_without_reasoning_nothing_of_it_is_left(sampled, cache):
    plain = generate_rejected(
        sampled.select(range(4)), FILES.model, SamplingSettings(num_rejects=2, max_new_tokens=96), cache_dir=cache
    )
    assert "answers" not in plain.column_names


def test_nothing_wrong_can_be_chosen_without_databases(rows, engine, cache):
    with pytest.raises(UserError, match="needs databases"):
        generate_rejected(rows, engine, SETTINGS, chosen="own", cache_dir=cache)


def test_the_demo_goes_from_a_teacher_to_pairs_that_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "COT_ROWS", 12)
    assert main(["demo", "--cot", "--output", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    sft, dpo = (json.loads((tmp_path / f"demo_cot_{name}.json").read_text()) for name in ("sft", "dpo"))
    assert re.search(rf"kept chains of thought +{len(sft)} ", said)
    assert "chosen: " in said
    assert all(FORMATS["fenced"].read(record["output"]) for record in sft)
    assert all(FORMATS["fenced"].read(pair[side]) for pair in dpo for side in ("chosen", "rejected"))
    assert set(json.loads((tmp_path / "dataset_info.json").read_text())) == {"demo_cot_sft", "demo_cot_dpo"}


# -- from file to file -----------------------------------------------------------------------------------------------


def test_chains_of_thought_find_their_rows_by_the_prompt(taught, rows, style, cache):
    sft = explode_cot(taught, cache_dir=cache)
    found = attach_cot(rows, sft.shuffle(seed=1), style, FILES.databases, cache_dir=cache)
    assert [set(each) for each in found["cot"]] == [set(each) for each in taught["cot"]]


def test_chains_of_thought_in_another_format_or_for_other_rows_are_refused(taught, rows, style, cache):
    sft = explode_cot(taught, cache_dir=cache)
    other = {"fenced": "think", "think": "fenced"}[style]
    with pytest.raises(UserError, match=f"Chain of thought 0 is not in the format '{other}'"):
        attach_cot(rows, sft, other, FILES.databases, cache_dir=cache)
    with pytest.raises(UserError, match="No chain of thought is for a prompt of these rows"):
        attach_cot(load_sft(FILES.heldout), sft, style, FILES.databases, cache_dir=cache)


def test_a_chain_of_thought_that_is_not_right_for_its_row_is_never_chosen(rows, style, cache, caplog):
    """Golds were mended since, or somebody else wrote the file, or the same question is asked of two databases."""
    right, wrong = (FORMATS[style].write("We look.", sql) for sql in ("SELECT count(*) FROM book", "SELECT 12345"))
    base = {"instruction": "", "input": "How many books are there?"}
    two = load_sft(
        Dataset.from_list(
            [
                {**base, "output": "SELECT count(*) FROM book", "db_id": "library"},
                {**base, "output": "SELECT 1", "db_id": "shop"},
            ]
        )
    )
    kept = Dataset.from_list([{**base, "output": text} for text in (right, wrong)])
    found = attach_cot(two, kept, style, FILES.databases, cache_dir=cache)
    assert found["cot"][:] == [[right], []]
    assert "3 of 4 chains of thought are not proven right and left out." in caplog.text


def test_both_sides_of_a_pair_are_in_one_format(taught, sampled, engine, style, cache):
    other = {"fenced": "think", "think": "fenced"}[style]
    mixed = generate_rejected(taught, engine, settings(other), databases=FILES.databases, cache_dir=cache)
    with pytest.raises(UserError, match="both sides of a pair must be in one"):
        explode_rejected(mixed, cache_dir=cache)
    assert len(explode_rejected(mixed.remove_columns("cot"), chosen="own", cache_dir=cache)) > 0


def test_a_prompt_asks_for_the_format_of_its_answers_only(rows, engine, cache):
    few = rows.select(range(3))
    fenced = generate_rejected(few, engine, SETTINGS, cache_dir=cache)
    assert all(text.endswith(REQUEST) for text in fenced["input"])
    plain = generate_rejected(fenced, FILES.model, SamplingSettings(num_rejects=2, max_new_tokens=96), cache_dir=cache)
    assert plain["input"][:] == few["input"][:]


@pytest.fixture
def run(tmp_path, cache):
    def run(command, *arguments):
        common = ("--base-model", FILES.reasoner, "--sft-data", FILES.train, "--max-samples", ROWS)
        common += ("--max-new-tokens", 256, "--cache-dir", cache)
        return main([command, *map(str, (*common, *arguments))])

    return run


@pytest.mark.parametrize("style", ["fenced", "think"])
def test_the_command_line_goes_from_a_teacher_to_pairs(run, style, tmp_path, capsys):
    sft, dpo = tmp_path / "cot_sft.json", tmp_path / "cot_dpo.json"
    proof = ("--databases", FILES.databases)
    assert run("cot", *proof, "--answer-format", style, "--output", sft, "--max-per-row", 1) == 0
    said = capsys.readouterr().out
    assert "kept chains of thought" in said
    assert f"train on it: t2s-pref train-config --dataset-dir {tmp_path} --dataset cot_sft" in said
    assert run("reject", *proof, "--cot", style, "--cot-data", sft, "--output", dpo, "--max-per-row", 2) == 0
    said = capsys.readouterr().out
    assert "characters of a chosen answer" in said
    assert "rows all wrong" in said
    pairs = json.loads(dpo.read_text())
    assert {pair["chosen_from"] for pair in pairs} <= {"own", "gold"}
    assert all(FORMATS[style].read(pair[side]) for pair in pairs for side in ("chosen", "rejected"))
    kept = {record["input"]: record["output"] for record in json.loads(sft.read_text())}
    assert all(pair["chosen"] == kept[pair["input"]] for pair in pairs if pair["chosen_from"] == "gold")
    assert set(json.loads((tmp_path / "dataset_info.json").read_text())) == {"cot_sft", "cot_dpo"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cot",), "--cot pairs right answers with wrong ones, and only --databases tells these apart."),
        (("--cot-data", "x.json"), "--cot-data holds chains of thought for --cot, which is not given."),
        (("--cot", "--databases", FILES.databases, "--chosen", "gold"), "--chosen gold with --cot needs chains"),
        (("--chosen", "own"), "--chosen needs --databases."),
        (("--round", 0), "round is 0; it must be 1 or more"),
        (("--cot", "--enable-thinking", "--databases", FILES.databases), "with enable_thinking use 'think'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_one_line_and_code_2(run, tmp_path, capsys, arguments, message):
    assert run("reject", "--output", tmp_path / "out.json", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_teacher_and_policy_may_be_behind_an_endpoint(tmp_path, cache, capsys):
    with TransformersServe(FILES.reasoner, tmp_path) as server:
        at = ("--base-url", f"http://127.0.0.1:{server.port}/v1", "--model", server.model)
        common = (
            "--sft-data",
            FILES.train,
            "--max-samples",
            6,
            "--max-new-tokens",
            200,
            "--databases",
            FILES.databases,
        )
        common = (*at, *common, "--max-new-tokens", 200, "--temperature", 1.0, "--cache-dir", tmp_path / "cache")
        sft, dpo = tmp_path / "cot_sft.json", tmp_path / "cot_dpo.json"
        assert main(["cot", *map(str, (*common, "--output", sft, "--num-samples", 2))]) == 0
        pairing = ("--cot", "--cot-data", sft, "--output", dpo, "--max-candidates", 5)
        assert main(["reject", *map(str, (*common, *pairing))]) == 0
    assert "at an endpoint, by messages" in capsys.readouterr().out
    # the server is gone, and all that it answered is there
    assert main(["reject", *map(str, (*common, *pairing, "--dataset-name", "again"))]) == 0
    assert all(FORMATS["fenced"].read(record["output"]) for record in json.loads(sft.read_text()))
    pairs = json.loads(dpo.read_text())
    assert all(FORMATS["fenced"].read(pair[side]) for pair in pairs for side in ("chosen", "rejected"))


def test_rows_whose_gold_proves_nothing_cost_the_teacher_no_token(rows, cache):
    engine = TransformersEngine(FILES.reasoner, device="cpu")
    bad = rows.select(range(2)).map(lambda row: {"output": "SELECT nothing FROM nowhere"})
    taught = generate_cot(bad, engine, SETTINGS, databases=FILES.databases, cache_dir=cache)
    assert taught["cot_status"][:] == [["gold_error"]] * 2
    assert engine.work.generated == 0
    told = cot_summary(taught)
    assert (told.samples, told.kept, told.not_asked) == (0, 0, {"gold_error": 2})
    assert re.search("rows not asked for: gold fails +2 ", str(told))


def test_a_teacher_without_one_right_answer_writes_no_file(run, tmp_path, capsys):
    path = tmp_path / "wrong.json"
    records = json.loads(Path(FILES.train).read_text(encoding="utf-8"))[:2]
    path.write_text(json.dumps([{**record, "output": "SELECT nothing FROM nowhere"} for record in records]))
    arguments = ("--sft-data", path, "--databases", FILES.databases, "--output", tmp_path / "out.json")
    assert run("cot", *arguments) == 2
    assert "No chain of thought is left" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_data_that_reasons_is_not_paired_with_bare_candidates(run, taught, style, tmp_path, cache, capsys):
    path = save_llamafactory(explode_cot(taught, 1, cache_dir=cache), tmp_path / "cot_sft.json")
    common = ("--sft-data", path, "--databases", FILES.databases, "--output", tmp_path / "out.json")
    assert run("reject", *common) == 2
    assert "has a chain of thought in its output; candidates without one" in capsys.readouterr().err
    # with --cot it is gold and chain of thought in one
    assert run("reject", *common, "--cot", style, "--cot-data", path, "--chosen", "gold", "--max-samples", 8) == 0
    golds = {record["output"] for record in json.loads(path.read_text())}
    assert {pair["chosen"] for pair in json.loads((tmp_path / "out.json").read_text())} <= golds


def test_evaluation_takes_answers_that_reason(run, tmp_path):
    report = tmp_path / "report.json"
    assert run("evaluate", "--databases", FILES.databases, "--cot", "--report", report, "--temperature", 0) == 0
    assert json.loads(report.read_text())["accuracy"]["greedy"][""]["strict"] > 0.4


def test_a_right_candidate_that_speaks_of_a_given_answer_is_not_chosen(cache):
    texts = [FORMATS["fenced"].write(words, "SELECT 1") for words in ("As the given query shows.", "We count.")]
    rows = {"output": ["SELECT 1"], "rejected": [["SELECT 1", "SELECT 1", "SELECT 2"]]}
    rows["verdict"] = [["same_text", "same_text", "wrong_result"]]
    rows["answers"] = [[*texts, FORMATS["fenced"].write("We add.", "SELECT 2")]]
    (pair,) = explode_rejected(Dataset.from_dict(rows), chosen="own", cache_dir=cache)
    assert pair["chosen"] == texts[1]


def test_a_cot_column_of_an_empty_list_or_null_is_none(cache):
    rows = Dataset.from_dict(
        {
            "output": ["SELECT 1"] * 2,
            "rejected": [["SELECT 2"]] * 2,
            "answers": [["because\n\n```sql\nSELECT 2\n```"]] * 2,
            "verdict": [["wrong_result"]] * 2,
            "cot": [None, []],
        }
    )
    assert len(explode_rejected(rows, cache_dir=cache)) == 0
    assert summary(rows, cache_dir=cache).drops == {"no_chosen": 2}
