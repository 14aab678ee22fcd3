"""What users of audit_golds can rely on: every gold that proves nothing is listed, with the engine's own words."""

import json
import sqlite3
from contextlib import closing

import pytest
from datasets import Dataset

from t2s_pref import UserError, audit_golds, demo_files, load_sft

SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
MANY = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 100001) SELECT x FROM c"
# each gold, what the audit calls it, and a word of what it says
GOLDS = [
    ("SELECT name FROM singer", "ok", ""),
    ("SELECT name FROM singer WHERE age > 99", "gold_empty", ""),
    ("SELECT nme FROM singer", "gold_error", "nme"),
    ("SELECT name FROM singers", "gold_error", "singers"),
    ("SELECT name FROM singer WHERE", "gold_error", "incomplete input"),
    ("DROP TABLE singer", "gold_error", ""),
    ("", "gold_error", ""),
    (SLOW, "gold_timeout", ""),
    (MANY, "gold_truncated", ""),
    ("SELECT name FROM singer ORDER BY age LIMIT 1", "gold_nondeterministic", ""),
    ("SELECT random()", "gold_nondeterministic", ""),
    ("SELECT age, name FROM singer GROUP BY age", "gold_nondeterministic", ""),
]


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "music.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE singer (name TEXT, age INTEGER)")
        connection.execute("INSERT INTO singer VALUES ('Ana', 30), ('Bo', 30), ('Cy', 40)")
        connection.commit()
    return path


@pytest.fixture(scope="module")
def audit(music, tmp_path_factory):
    rows = Dataset.from_dict({"output": [gold for gold, _, _ in GOLDS]})
    return audit_golds(rows, music, gold_timeout=1, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("row", range(len(GOLDS)))
def test_each_gold_that_proves_nothing_is_found_and_no_other(audit, row):
    gold, verdict, said = GOLDS[row]
    found = {each.row: each for each in audit.findings}
    if verdict == "ok":
        assert row not in found
    else:
        assert (found[row].verdict, found[row].sql) == (verdict, gold)
        assert said in found[row].detail
        assert found[row].detail or verdict == "gold_empty"


def test_the_counts_are_those_of_the_findings(audit):
    assert audit.rows == len(GOLDS) == sum(audit.verdicts.values())
    for verdict, count in audit.verdicts.items():
        assert count == [expected for _, expected, _ in GOLDS].count(verdict)
    assert len(audit.findings) == audit.rows - audit.verdicts["ok"]


def test_the_table_has_every_count_and_finding_and_the_json_all_of_it(audit):
    shown = str(audit)
    for verdict, count in audit.verdicts.items():
        assert f"{verdict:<20}{count:>8,}" in shown
    for finding in audit.findings:
        assert f"row {finding.source_index} (no db_id): {finding.verdict}" in shown
    assert max(map(len, shown.splitlines())) < 300
    assert json.loads(json.dumps(audit.to_dict()))["findings"][1] == {
        "row": 2,
        "source_index": 2,
        "db_id": "",
        "verdict": "gold_error",
        "detail": "no such column: nme",
        "sql": "SELECT nme FROM singer",
    }


def test_a_misspelt_name_in_double_quotes_is_a_suspect_but_no_error(music, cache_dir):
    rows = Dataset.from_dict({"output": ['SELECT name FROM singer WHERE "ages" > 1', "SELECT name FROM singer"]})
    audit = audit_golds(rows, music, cache_dir=cache_dir)
    assert audit.verdicts == {"ok": 2}
    assert not audit.findings
    assert [(each.row, "ages" in each.detail) for each in audit.suspects] == [(0, True)]
    assert "may be misspelt" in str(audit)


def test_a_row_names_its_place_in_the_source_after_filtering(music, cache_dir):
    rows = load_sft(
        Dataset.from_dict({"instruction": ["a"] * 3, "input": [""] * 3, "output": ["SELECT 1"] * 2 + ["?"]})
    )
    audit = audit_golds(rows.select([2]), music, cache_dir=cache_dir)
    assert [(each.row, each.source_index) for each in audit.findings] == [(0, 2)]
    assert "row 2 " in str(audit)


def test_one_bad_alternative_makes_the_row_a_finding(music, cache_dir):
    rows = Dataset.from_dict({"output": ["SELECT 1"] * 2, "alternatives": [["SELECT nope"], ["SELECT 1.0"]]})
    audit = audit_golds(rows, music, cache_dir=cache_dir)
    assert [(each.row, each.verdict) for each in audit.findings] == [(0, "gold_error")]
    assert "SELECT nope" in audit.findings[0].sql


def test_a_row_whose_database_is_missing_is_a_finding_and_the_others_go_on(cache_dir):
    rows = Dataset.from_dict({"db_id": ["library", "nowhere"], "output": ["SELECT 1"] * 2})
    audit = audit_golds(rows, demo_files().databases, cache_dir=cache_dir)
    assert audit.verdicts == {"ok": 1, "no_database": 1}


def test_the_bundled_golds_are_all_fit_to_prove_something(cache_dir):
    for path in (demo_files().train, demo_files().heldout):
        audit = audit_golds(load_sft(path), demo_files().databases, cache_dir=cache_dir)
        assert set(audit.verdicts) <= {"ok", "gold_empty"}


def test_an_audit_is_the_same_when_it_is_read_from_the_cache(music, cache_dir):
    rows = Dataset.from_dict({"output": [gold for gold, verdict, _ in GOLDS if verdict != "gold_timeout"]})
    assert audit_golds(rows, music, cache_dir=cache_dir) == audit_golds(rows, music, cache_dir=cache_dir)


def test_what_cannot_be_audited_is_refused_in_one_line(music, cache_dir):
    with pytest.raises(UserError, match="output") as refused:
        audit_golds(Dataset.from_dict({"sql": ["SELECT 1"]}), music, cache_dir=cache_dir)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="nowhere"):
        audit_golds(Dataset.from_dict({"output": ["SELECT 1"]}), "nowhere.sqlite", cache_dir=cache_dir)


def test_no_rows_are_an_audit_without_findings(music, cache_dir):
    audit = audit_golds(Dataset.from_dict({"output": ["SELECT 1"]}).select([]), music, cache_dir=cache_dir)
    assert (audit.rows, audit.verdicts, audit.findings) == (0, {}, ())
    assert "rows" in str(audit)
