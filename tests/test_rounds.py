"""On-policy rounds: seeds of their own, pairs that say where they come from, and one dataset of all rounds."""

import json
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_pairs,
    load_sft,
    merge_pairs,
    save_llamafactory,
)
from t2s_pref.cli import main
from t2s_pref.sql import normalize_sql
from t2s_pref.verdicts import WRONG
from t2s_pref.verifier import statement_of

FILES = demo_files()
SETTINGS = SamplingSettings(num_rejects=2, max_new_tokens=96, temperature=1.0)
ROWS = 24


def save_adapter(folder, seed):
    """A LoRA on the bundled model that changes its answers a little, as a round of training does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(FILES.model, dtype=torch.float32)
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    home = tmp_path_factory.mktemp("rounds")
    return [save_adapter(home / f"round-{number}", number) for number in (1, 2)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rows():
    return load_sft(FILES.train).select(range(ROWS))


@pytest.fixture(scope="module")
def sampled(rows, adapters, cache):
    """Both rounds: each from its own adapter, until two are proven wrong and one right."""
    return [
        generate_rejected(
            rows,
            TransformersEngine(FILES.model, adapter_path=str(adapter), device="cpu"),
            SamplingSettings(**{**vars(SETTINGS), "round": number}),
            databases=FILES.databases,
            chosen="own",
            cache_dir=cache,
        )
        for number, adapter in enumerate(adapters, 1)
    ]


@pytest.fixture(scope="module")
def pairs(sampled, cache):
    return [explode_rejected(each, dedup="normalized", chosen="own", cache_dir=cache) for each in sampled]


def test_the_round_enters_the_seed_of_every_row():
    seeds = [
        {SamplingSettings(round=number).row_seed(index) for index in (0, 1, 999, 2**62)} for number in (None, 1, 2, 3)
    ]
    assert seeds[0] == seeds[1]
    assert len(set.union(*seeds[1:])) == 12


def test_the_same_policy_writes_other_candidates_in_another_round(rows, cache):
    engine = TransformersEngine(FILES.model, device="cpu")
    sample = partial(generate_rejected, rows.select(range(6)), engine, cache_dir=cache)
    plain, first, second = (
        sample(SamplingSettings(**{**vars(SETTINGS), "num_rejects": 4, "round": number}))["rejected"][:]
        for number in (None, 1, 2)
    )
    assert plain == first
    assert sum(one != other for one, other in zip(first, second, strict=True)) >= 4


def test_each_rounds_pairs_carry_their_round_adapter_and_hash(pairs, adapters):
    hashes = set()
    for number, (each, adapter) in enumerate(zip(pairs, adapters, strict=True), 1):
        assert len(each) > 5
        assert set(each["round"]) == {number}
        assert set(each["adapter"]) == {adapter.name}  # its name, not its path
        (found,) = set(each["policy_hash"])
        hashes.add(found)
    assert len(hashes) == 2


def test_own_pairs_have_both_sides_from_the_model_and_each_is_proven(pairs, sampled, rows):
    from contextlib import closing
    from sqlite3 import connect

    golds = dict(zip(rows["source_index"], rows["output"], strict=True))
    for each, of in zip(pairs, sampled, strict=True):
        candidates = dict(zip(of["source_index"], of["rejected"], strict=True))
        verdicts = dict(zip(of["source_index"], of["verdict"], strict=True))
        for pair in each:
            row = pair["source_index"]
            assert pair["chosen"] in candidates[row]
            assert pair["rejected"] == candidates[row][pair["rejected_index"]]
            assert pair["chosen_from"] == "own"
            assert verdicts[row][candidates[row].index(pair["chosen"])] in ("equivalent", "same_ast")
            assert pair["verdict"] in WRONG
            assert statement_of(pair["chosen"]) != statement_of(golds[row])
            # and proven again, by a connection of our own
            path = f"file:{FILES.databases}/{pair['db_id']}/{pair['db_id']}.sqlite?mode=ro"
            with closing(connect(path, uri=True)) as database:
                right, gold = (sorted(map(repr, database.execute(sql))) for sql in (pair["chosen"], golds[row]))
                assert right == gold


def test_rows_all_right_and_all_wrong_give_no_own_pair_and_are_counted(sampled, cache):
    from t2s_pref import summary

    for each in sampled:
        told = summary(each, dedup="normalized", chosen="own", cache_dir=cache)
        right, wrong = ("equivalent", "same_ast", "same_text"), set(WRONG)
        lists = list(zip(each["verdict"], each["candidate_status"], strict=True))
        whole = [verdicts for verdicts, statuses in lists if verdicts and len(verdicts) == len(statuses)]
        assert told.mastered == sum(set(verdicts) <= set(right) for verdicts in whole)
        assert told.all_wrong == sum(set(verdicts) <= wrong for verdicts in whole)
        assert told.pairs + sum(told.drops.values()) == told.candidates
        of = [
            explode_rejected(each, dedup="normalized", chosen=name, cache_dir=cache) for name in ("own", "own_or_gold")
        ]
        assert len(of[0]) == told.pairs <= len(of[1])
        assert set(of[1]["chosen_from"]) <= {"own", "gold"}


def test_a_row_is_sampled_until_it_also_has_one_that_is_right(sampled):
    for each in sampled:
        for verdicts, statuses in zip(each["verdict"], each["candidate_status"], strict=True):
            own = {"equivalent", "same_ast"} & set(verdicts)
            wrong = sum(verdict in WRONG for verdict in verdicts)
            assert (own and wrong >= SETTINGS.num_rejects) or len(statuses) == 4 * SETTINGS.num_rejects


def test_rounds_merge_without_duplicates(pairs):
    both = merge_pairs(*pairs)
    keys = [
        (row["input"], normalize_sql(row["chosen"], "sqlite"), normalize_sql(row["rejected"], "sqlite")) for row in both
    ]
    assert len(set(keys)) == len(keys)
    every = {
        (row["input"], normalize_sql(row["chosen"], "sqlite"), normalize_sql(row["rejected"], "sqlite"))
        for each in pairs
        for row in each
    }
    assert set(keys) == every
    assert set(both["round"]) == {1, 2}
    assert len(merge_pairs(both, *pairs)) == len(both)
    # what both rounds found is the first one's
    first = both.filter(lambda row: row["round"] == 1, keep_in_memory=True)
    assert len(first) == len(merge_pairs(pairs[0]))


def test_a_round_is_read_back_from_its_file_as_it_was(pairs, tmp_path):
    merged = merge_pairs(*pairs).remove_columns("output")  # LLaMA-Factory trains on chosen and rejected
    for name in ("pairs.json", "pairs.jsonl"):
        path = save_llamafactory(merged, tmp_path / name)
        assert load_pairs(path)[:] == merged[:]
    assert json.loads((tmp_path / "dataset_info.json").read_text())["pairs"]["columns"] == {
        "prompt": "instruction",
        "query": "input",
        "chosen": "chosen",
        "rejected": "rejected",
    }


def test_pairs_without_a_round_are_the_firsts(pairs):
    old = pairs[0].remove_columns(["round", "adapter", "policy_hash"])
    both = merge_pairs(old, pairs[1])
    assert both["round"][: len(merge_pairs(old))] == [1] * len(merge_pairs(old))
    assert merge_pairs(old).column_names == [
        name for name in merge_pairs(pairs[0]).column_names if name not in ("round", "adapter", "policy_hash")
    ]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"instruction": "a", "chosen": "b"}], "record 0 (line 1): column 'rejected' is missing"),
        ([{"instruction": "a", "chosen": "b", "rejected": ["c"]}], "column 'rejected' is \"['c']\""),
        ([{"instruction": "a", "chosen": "b", "rejected": "c", "round": "2"}], "column 'round' is '2'"),
        ([{"instruction": "a", "chosen": "b", "rejected": "c", "round": 2**70}], "rounds are counted from 1"),
        ([{"instruction": "a", "chosen": None, "rejected": "c"}], "column 'chosen' is 'None'"),
        ([{"instruction": "a", "chosen": "b", "rejected": "c", "history": "d"}], "column 'history' has 'd'"),
    ],
)
def test_a_file_that_holds_no_pairs_is_refused_with_its_record(tmp_path, records, message):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError) as refused:
        load_pairs(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_that_are_not_exploded_are_not_merged(sampled):
    with pytest.raises(UserError, match="explode_rejected makes one row a pair"):
        merge_pairs(sampled[0].add_column("chosen", [""] * ROWS))
    with pytest.raises(UserError, match="Column 'chosen' not found"):
        merge_pairs(Dataset.from_dict({"instruction": [""], "input": [""], "rejected": [""]}))


PAIR = {"instruction": "", "input": "How many?", "chosen": "SELECT 1", "rejected": "SELECT 2"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rejected": None}, "Row 0: column 'rejected' is empty"),
        ({"chosen": [{"role": "assistant", "content": "SELECT 1"}]}, "Column 'chosen' is "),
        ({"round": "2"}, "Column 'round' is Value('string'); expected Value('int64')"),
        ({"history": [["a"]]}, "Row 0: column 'history' has "),
    ],
)
def test_what_is_no_pair_is_not_merged_but_refused_in_one_line(changed, message):
    with pytest.raises(UserError) as refused:
        merge_pairs(Dataset.from_list([{**PAIR, **changed}]))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nothing_is_not_merged():
    with pytest.raises(UserError, match="merge_pairs got no pairs"):
        merge_pairs()


def test_pairs_that_reason_otherwise_are_two_though_their_sql_is_the_same():
    texts = [
        f"Join -- {words}\n\n```sql\n{sql}\n```"
        for words in ("a and b", "quite another")
        for sql in ("SELECT 2", "select 2")
    ]
    pairs = [{**PAIR, "chosen": "We count.\n\n```sql\nSELECT 1\n```", "rejected": text} for text in texts]
    assert merge_pairs(Dataset.from_list(pairs))["rejected"][:] == [texts[0], texts[2]]


def test_the_command_line_goes_from_round_to_round(adapters, cache, tmp_path, capsys):
    def reject(number, *more):
        return main(
            [
                *("reject", "--base-model", FILES.model, "--adapter-path", str(adapters[number - 1])),
                *("--sft-data", FILES.train, "--max-samples", str(ROWS), "--databases", FILES.databases),
                *("--num-rejects", "2", "--max-new-tokens", "96", "--temperature", "1.0", "--chosen", "own"),
                *("--round", str(number), "--cache-dir", str(cache), "--output", str(tmp_path / f"{number}.json")),
                *more,
            ]
        )  # fmt: skip

    assert reject(1) == 0
    assert reject(2, "--merge", str(tmp_path / "1.json")) == 0
    assert "each once" in capsys.readouterr().out
    first, both = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert both[: len(first)] == first
    assert {pair["round"] for pair in both} == {1, 2}
    assert {pair["adapter"] for pair in both} == {"round-1", "round-2"}
    assert all(str(tmp_path) not in json.dumps(pair) for pair in both)
    assert reject(2, "--merge", str(tmp_path / "2.json")) == 2
    assert "which is read and would be overwritten" in capsys.readouterr().err
    assert json.loads((tmp_path / "2.json").read_text()) == both
