"""What users of to_trl and of the sharegpt layout can rely on: the prompt that was sampled from, and whole answers."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    explode_rejected,
    generate_rejected,
    lineage,
    load_pairs,
    save_llamafactory,
    to_trl,
)
from t2s_pref.prompts import messages

PAIR = {"instruction": "Write SQL.", "input": "How many?", "chosen": "SELECT 1", "rejected": "SELECT 2"}
CHAT = {**PAIR, "system": "You write SQL.", "history": [["One?", "SELECT 1"], ["Two?", "SELECT 2"]]}
GOLD = {"instruction": "Write SQL.", "input": "How many?", "output": "SELECT 1"}


def test_a_pair_becomes_the_messages_that_were_sampled_from_and_one_answer_each():
    (row,) = to_trl(Dataset.from_list([CHAT]))
    assert row["prompt"] == messages(CHAT)
    assert [turn["role"] for turn in row["prompt"]] == ["system", *("user", "assistant") * 2, "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "SELECT 1"}]
    assert row["rejected"] == [{"role": "assistant", "content": "SELECT 2"}]
    assert set(row) == {"prompt", "chosen", "rejected"}


def test_supervised_rows_become_prompt_and_completion():
    (row,) = to_trl(Dataset.from_list([GOLD]))
    assert row == {
        "prompt": [{"role": "user", "content": "Write SQL.\nHow many?"}],
        "completion": [{"role": "assistant", "content": "SELECT 1"}],
    }


def test_other_columns_stay_and_the_source_does_not_change():
    pairs = Dataset.from_list([{**PAIR, "db_id": "a", "verdict": "wrong_result", "output": "SELECT 1"}])
    before = pairs[:], pairs.features.copy(), pairs._fingerprint
    row = to_trl(pairs)[0]
    assert (row["db_id"], row["verdict"], row["output"]) == ("a", "wrong_result", "SELECT 1")
    assert (pairs[:], pairs.features, pairs._fingerprint) == before


def test_each_split_and_any_format_are_converted():
    both = to_trl(
        DatasetDict({"train": Dataset.from_list([PAIR]), "test": Dataset.from_list([PAIR]).with_format("torch")})
    )
    assert both["train"][0] == both["test"][0]
    with pytest.raises(UserError, match="materialise it first"):
        to_trl(IterableDataset.from_generator(lambda: iter([PAIR])))


@pytest.mark.parametrize("thinking", [True, False])
def test_the_thinking_mode_that_was_sampled_with_goes_to_the_chat_template(tmp_path, rows, thinking):
    settings = SamplingSettings(num_rejects=2, max_new_tokens=48, enable_thinking=thinking)
    engine = TransformersEngine(demo_files().model, device="cpu")
    pairs = explode_rejected(generate_rejected(rows.select(range(4)), engine, settings, cache_dir=tmp_path))
    kept = pairs.filter(lambda row: row["db_id"] is not None).shuffle(seed=1)
    assert {row["chat_template_kwargs"]["enable_thinking"] for row in to_trl(kept)} == {thinking}
    # through a file too
    save_llamafactory(pairs, tmp_path / "pairs.json")
    again = to_trl(load_pairs(tmp_path / "pairs.json"))
    assert again[0]["chat_template_kwargs"] == {"enable_thinking": thinking}


def test_a_dataset_without_rows_gets_the_columns_of_one_with_rows():
    pairs = Dataset.from_list([PAIR])
    assert to_trl(pairs.select([])).features == to_trl(pairs).features


def test_where_modes_differ_or_none_is_noted_nothing_is_handed_on():
    pairs = Dataset.from_list([PAIR])
    assert "chat_template_kwargs" not in to_trl(pairs).column_names
    for thinking in (True, False):
        lineage.note(pairs, step=lineage.SAMPLED, settings={"enable_thinking": thinking})
    assert "chat_template_kwargs" not in to_trl(pairs).column_names


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rejected": "SELECT 1"}, "Row 1: 'rejected' equals 'chosen'"),
        ({"chosen": " "}, "Row 1: column 'chosen' is blank"),
        ({"rejected": None}, "Row 1: column 'rejected' is null"),
        ({"history": [["a"]]}, "Row 1: column 'history' has "),
    ],
)
def test_a_row_that_would_be_learnt_wrongly_is_named(changed, message):
    dataset = Dataset.from_list([{"history": [], **PAIR}, {"history": [], **PAIR, **changed}])
    with pytest.raises(UserError) as refused:
        to_trl(dataset)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_that_are_not_exploded_are_refused_with_the_way_out():
    with pytest.raises(UserError, match="call explode_rejected first"):
        to_trl(Dataset.from_list([{**GOLD, "rejected": ["SELECT 2"]}]))
    with pytest.raises(UserError, match="Column 'instruction' not found"):
        to_trl(Dataset.from_list([{"prompt": "How many?", "chosen": "a", "rejected": "b"}]))


# LLaMA-Factory's sharegpt


def test_sharegpt_holds_the_prompt_as_messages_and_each_side_as_one(tmp_path):
    path = save_llamafactory(Dataset.from_list([{**CHAT, "db_id": "a"}]), tmp_path / "p.json", formatting="sharegpt")
    (record,) = json.loads(path.read_text())
    assert record == {
        "messages": messages(CHAT),
        "chosen": {"role": "assistant", "content": "SELECT 1"},
        "rejected": {"role": "assistant", "content": "SELECT 2"},
        "db_id": "a",
    }
    assert json.loads((tmp_path / "dataset_info.json").read_text())["p"] == {
        "file_name": "p.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    # and it is read back as the same pair
    assert load_pairs(path)[0] == {
        **PAIR,
        "instruction": "Write SQL.\nHow many?",
        "input": "",
        "system": CHAT["system"],
        "history": CHAT["history"],
        "db_id": "a",
    }


def test_supervised_rows_in_sharegpt_end_in_their_answer(tmp_path):
    path = save_llamafactory(Dataset.from_list([GOLD]), tmp_path / "s.jsonl", formatting="sharegpt")
    assert json.loads(path.read_text()) == {"messages": [*messages(GOLD), {"role": "assistant", "content": "SELECT 1"}]}
    assert "ranking" not in json.loads((tmp_path / "dataset_info.json").read_text())["s"]
    assert load_dataset("json", data_files=str(path), split="train", cache_dir=tmp_path)[0]["messages"][-1]["content"]


def test_another_layout_is_refused_with_the_allowed_ones(tmp_path):
    with pytest.raises(UserError, match="formatting is 'openai'; it must be one of alpaca, sharegpt"):
        save_llamafactory(Dataset.from_list([PAIR]), tmp_path / "p.json", formatting="openai")
    assert not list(tmp_path.iterdir())
