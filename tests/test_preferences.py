"""What users of load_pairs can rely on: preference data of any tool is read as the pairs that it holds."""

import json

import pytest
from datasets import Dataset, DatasetDict

from t2s_pref import UserError, load_pairs
from t2s_pref.preferences import holds_pairs

SIDES = {"chosen": "SELECT 1", "rejected": "SELECT 2"}
TURNS = [
    {"role": "system", "content": "You write SQL."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "SELECT 1"},
    {"role": "user", "content": "Two?"},
]
PROMPT = {"instruction": "Two?", "input": "", "system": "You write SQL.", "history": [["One?", "SELECT 1"]]}


def openai(text):
    return {"role": "assistant", "content": text}


def shared(turns):
    """The same turns in ShareGPT's words."""
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]


LAYOUTS = {
    "TRL conversational": {"prompt": TURNS, **{side: [openai(sql)] for side, sql in SIDES.items()}},
    "TRL implicit prompt": {side: [*TURNS, openai(sql)] for side, sql in SIDES.items()},
    "prompt beside whole conversations": {"prompt": "Two?", **{k: [*TURNS, openai(v)] for k, v in SIDES.items()}},
    "sharegpt of LLaMA-Factory": {"messages": TURNS, **{side: openai(sql) for side, sql in SIDES.items()}},
    "ShareGPT's words": {"conversations": shared(TURNS), **{k: shared([openai(v)])[0] for k, v in SIDES.items()}},
    "alpaca": {**PROMPT, **SIDES},
    "alpaca of 2023": {**PROMPT, "output": list(SIDES.values())},
}


@pytest.mark.parametrize("record", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_is_read_as_the_same_pair(tmp_path, record):
    (tmp_path / "p.json").write_text(json.dumps([record, record]))
    assert load_pairs(tmp_path / "p.json").to_list() == [{**PROMPT, **SIDES}] * 2
    assert holds_pairs(tmp_path / "p.json")
    assert load_pairs(Dataset.from_list([record])).to_list() == [{**PROMPT, **SIDES}]


def test_a_prompt_as_text_is_the_instruction(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "How many?", **SIDES}) + "\n")
    assert load_pairs(tmp_path / "p.jsonl")[0] == {"instruction": "How many?", "input": "", **SIDES}


def test_what_is_known_of_a_pair_is_kept_and_other_columns_are_not():
    known = {
        "db_id": "a",
        "output": "SELECT 1",
        "verdict": "wrong_result",
        "distance": 0.5,
        "source_index": 3,
        "round": 2,
    }
    (row,) = load_pairs(Dataset.from_list([{**PROMPT, **SIDES, **known, "score": 0.1, "alternatives": ["SELECT 1.0"]}]))
    assert row == {**PROMPT, **SIDES, **known, "alternatives": ["SELECT 1.0"]}


def test_the_longer_prompt_is_the_whole_one():
    answers = {side: [TURNS[-1], openai(sql)] for side, sql in SIDES.items()}
    assert load_pairs(Dataset.from_list([{"prompt": TURNS, **answers}]))[0] == {**PROMPT, **SIDES}
    noted = {**LAYOUTS["TRL conversational"], "input": "a note"}
    assert load_pairs(Dataset.from_list([noted]))[0] == {**PROMPT, **SIDES}


def test_each_split_is_loaded():
    part = Dataset.from_list([{**PROMPT, **SIDES}])
    assert set(load_pairs(DatasetDict({"train": part, "test": part}))) == {"train", "test"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (SIDES, "has no prompt; expected instruction and input, prompt, messages or conversations"),
        ({**SIDES, "prompt": []}, "has no prompt"),
        ({**SIDES, "prompt": 7}, "has a prompt that is '7'"),
        ({**SIDES, "prompt": TURNS[:3]}, "in turns of user and assistant"),
        ({**SIDES, "messages": [{"role": "tool", "content": "x"}]}, "in turns of user and assistant"),
        ({**SIDES, "messages": [{"role": "user", "content": None}]}, "in turns of user and assistant"),
        ({**SIDES, **PROMPT, "system": 3}, "column 'system' is '3'"),
        ({**SIDES, **PROMPT, "history": [["a"]]}, "column 'history' has"),
        ({**SIDES, **PROMPT, "distance": "near"}, "column 'distance' is 'near'; expected float or null"),
        ({**SIDES, **PROMPT, "round": 0}, "rounds are counted from 1"),
        ({**PROMPT, "chosen": "a"}, "column 'rejected' is missing"),
        ({**PROMPT, **SIDES, "chosen": [openai("a"), TURNS[1]]}, "column 'chosen' is"),
    ],
)
def test_a_record_that_is_no_pair_is_named(tmp_path, record, message):
    (tmp_path / "p.json").write_text(json.dumps([{**PROMPT, **SIDES}, record]))
    with pytest.raises(UserError) as refused:
        load_pairs(tmp_path / "p.json")
    assert "record 1 (line 1): " in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_supervised_rows_are_told_from_pairs(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "SELECT 1"}]))
    assert not holds_pairs(tmp_path / "s.json")
