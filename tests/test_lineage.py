"""What each step did is carried with the dataset, wherever it goes, and names no place."""

import getpass
import json
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    demo_files,
    explode_cot,
    explode_rejected,
    generate_cot,
    generate_rejected,
    lineage,
    load_pairs,
    load_sft,
    merge_pairs,
    save_llamafactory,
    summary,
)
from t2s_pref.chains import attach_cot
from t2s_pref.cleaning import clean_preferences
from t2s_pref.files import public_name

FILES = demo_files()
SETTINGS = SamplingSettings(num_rejects=2, max_new_tokens=64, seed=7)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("lineage")


@pytest.fixture(scope="module")
def sampled(rows, home):
    engine = TransformersEngine(FILES.model, device="cpu")
    return generate_rejected(rows.select(range(8)), engine, SETTINGS, databases=FILES.databases, cache_dir=home)


@pytest.fixture(scope="module")
def pairs(sampled, home):
    return explode_rejected(sampled, dedup="normalized", cache_dir=home)


def steps(dataset):
    return [each["step"] for each in lineage.records(dataset)]


def test_the_steps_say_what_was_sampled_and_what_became_of_it(sampled, pairs, home):
    assert steps(pairs) == ["generate_rejected", "verify_rejected", "explode_rejected"]
    drawn, proven, paired = lineage.records(pairs)
    assert drawn["model"]["name"] == "model"
    assert drawn["adapter"] is None
    assert drawn["settings"]["seed"] == 7
    assert drawn["training"] == {"template": "qwen3_nothink"}
    assert proven["engines"].startswith("SQLite")
    counts = summary(sampled, dedup="normalized", cache_dir=home)
    assert (paired["rows"], paired["candidates"], paired["pairs"]) == (counts.rows, counts.candidates, counts.pairs)
    assert paired["dropped"] == counts.drops
    assert paired["verdicts"] == counts.verdicts


def test_a_cached_result_says_the_same(rows, sampled, home):
    again = generate_rejected(
        rows.select(range(8)),
        TransformersEngine(FILES.model, device="cpu"),
        SETTINGS,
        databases=FILES.databases,
        cache_dir=home,
    )
    assert again.info.description == sampled.info.description


def test_it_goes_through_transforms_disk_and_files(pairs, tmp_path):
    noted = lineage.records(pairs)
    some = (
        pairs.filter(lambda row: True).map(lambda row: {"n": 1}).shuffle(seed=1).train_test_split(0.5, seed=1)["test"]
    )
    assert lineage.records(some) == noted
    some.save_to_disk(tmp_path / "disk")
    assert lineage.records(load_from_disk(tmp_path / "disk")) == noted
    assert lineage.records(concatenate_datasets([some, some])) == noted
    for name, formatting in (("a.json", "alpaca"), ("b.jsonl", "sharegpt")):
        path = save_llamafactory(some, tmp_path / name, formatting=formatting)
        assert lineage.records(load_pairs(path)) == noted
    assert lineage.records(merge_pairs(pairs, load_pairs(path))) == noted


def test_it_names_no_place_and_no_user(pairs, home, tmp_path):
    save_llamafactory(pairs, tmp_path / "p.json")
    said = json.dumps(lineage.records(pairs)) + (tmp_path / "dataset_info.json").read_text()
    for secret in (str(Path.home()), str(home), str(tmp_path), FILES.model, FILES.databases, f"/{getpass.getuser()}/"):
        assert secret not in said


def test_sampling_anew_forgets_what_was_noted_of_the_earlier_candidates(sampled, home):
    again = generate_rejected(
        sampled, TransformersEngine(FILES.model, device="cpu"), SamplingSettings(max_new_tokens=48), cache_dir=home
    )
    assert steps(again) == ["generate_rejected"]
    assert len([line for line in lineage.told(again) if line.startswith("generate_rejected")]) == 1


def test_a_teacher_is_noted_beside_the_policy(rows, home, tmp_path):
    settings = SamplingSettings(num_rejects=2, max_new_tokens=256, answer_format="fenced")
    engine = TransformersEngine(FILES.reasoner, device="cpu")
    taught = generate_cot(rows.select(range(8)), engine, settings, databases=FILES.databases, cache_dir=home)
    assert steps(taught) == ["generate_cot", "verify_rejected"]
    kept = explode_cot(taught, cache_dir=home)
    assert steps(kept) == ["generate_cot", "verify_rejected", "explode_cot"]
    explained = lineage.records(kept)[-1]
    assert explained["kept"] == len(kept)
    assert explained["kept"] + sum(explained["dropped"].values()) == explained["candidates"]
    path = save_llamafactory(kept, tmp_path / "cot.json")
    attached = attach_cot(rows.select(range(8)), load_sft(path), "fenced", FILES.databases, cache_dir=home)
    assert steps(attached) == steps(kept)
    assert lineage.records(attached)[0]["settings"]["answer_format"] == "fenced"


def test_pairs_of_another_tool_that_were_cleaned_say_so(tmp_path, cache_dir):
    gold, wrong = "SELECT count(*) FROM book", "SELECT count(*) FROM author"
    pair = {"instruction": "How many books?", "input": "", "chosen": gold, "rejected": wrong, "db_id": "library"}
    (tmp_path / "old.json").write_text(json.dumps([pair, {**pair, "rejected": "SELECT count(book_id) FROM book"}]))
    clean_preferences(tmp_path / "old.json", FILES.databases, tmp_path / "new.json", cache_dir=cache_dir)
    proven, paired = lineage.records(load_pairs(tmp_path / "new.json"))
    assert proven["step"] == "verify_rejected"
    assert (paired["candidates"], paired["pairs"], paired["dropped"]) == (2, 1, {"equivalent": 1})


@pytest.mark.parametrize(
    "record",
    [
        {"step": "explode_rejected", "rows": "many"},
        {"step": "explode_rejected", "verdicts": {"a": "b"}},
        {"step": "explode_rejected", "dropped": [1]},
        {"step": "generate_rejected", "model": "m"},
        {"step": "generate_rejected", "settings": 3},
        {"step": "generate_rejected", "rows": True},
    ],
)
def test_a_note_that_cannot_be_relied_on_is_left_out(record):
    whole = {"step": "generate_rejected", "model": {"name": "m"}, "adapter": None, "settings": {"stop": []}}
    assert lineage.lines_of([record, whole]) == lineage.lines_of([whole])
    assert len(lineage.lines_of([whole])) == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("/home/alice/models/m", "m"),
        ("~/models/m/", "m"),
        (r"C:\Users\alice\m", "m"),
        ("models/alice/m", "m"),
    ],
)
def test_a_path_is_named_without_its_folders(name, shown):
    assert public_name(name) == shown


@pytest.mark.parametrize(
    "text", ['{"t2s_pref": ', '{"t2s_pref": 3}', '{"t2s_pref": {"step": 1}}', '{"t2s_pref": [' * 9999]
)
def test_a_description_that_somebody_wrote_breaks_nothing(text):
    dataset = Dataset.from_list([{"a": 1}])
    dataset.info.description = f"Mine.\n{text}"
    lineage.note(dataset, "load_sft: x", step=lineage.LOADED, source="x")
    assert lineage.records(dataset) == [{"step": "load_sft", "source": "x"}]
    assert lineage.told(dataset)[0] == "Mine."
    assert lineage.lines_of({"not": "a list"}) == lineage.lines_of([None, 3, {}]) == []
